"""The subcommands `dml-dist submit` and `dml-dist job`: commands on clusters."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dml_dist.errors import ConfigError, DataError, DmlDistError
from dml_dist.terminal import open_console, say

if TYPE_CHECKING:
    from dml_dist.jobs.records import JobRecord, JobRecords
    from dml_dist.jobs.submit import Command
    from dml_dist.jobs.target import JobRequest, Target

job_app = typer.Typer(no_args_is_help=True, help="List, show, follow and stop submitted jobs.")
console = open_console()

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Job, as `submit` named it.")]

# The words of the inner command follow the first one that is no option.
SUBMIT_SETTINGS = {"allow_interspersed_args": False}
_LINES_OF_A_FAILED_JOB = 20


def submit(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND CONFIG ...", help="train, tune, compare or evaluate."),
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="TARGET", help="ray, slurm, kuberay, or a YAML file.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the target; repeatable."),
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Print what would be sent, and exit.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the job is submitted.")
    ] = False,
    id: Annotated[str | None, typer.Option("--id", help="Name of the job; default NAME-1.")] = None,
) -> None:
    """Check a command on this machine, send it to a cluster and follow its output."""
    from dml_dist.jobs.build_target import load_target
    from dml_dist.jobs.follow import follow, hints
    from dml_dist.jobs.records import JobRecords
    from dml_dist.jobs.submit import check_folder, name_of, request_of, send

    config, target = load_target(to, changes or ())
    parsed = _parse(context, command)
    records = JobRecords()
    if id is not None:
        records.require_new(id)
    request = request_of(parsed, id or records.next_id(name_of(parsed)))
    if render:
        typer.echo(target.render(request), nl=False)
        return
    check_folder(parsed)
    _dry_run(context, parsed, request)
    target.check(request)
    record = send(target, config, request, records, console)
    if detach:
        _say(hints(request.id))
        return
    raise typer.Exit(follow(record, target, records, console))


def _parse(context: typer.Context, command: list[str]) -> Command:
    """Parse the inner command with the parser of the real one."""
    from dml_dist.jobs.submit import COMMANDS, read_command

    name, *words = command
    inner = _inner(context, name)
    known = [one for one in COMMANDS if _inner(context, one) is not None]
    if name not in known or inner is None:
        raise ConfigError(f"{name} cannot be submitted; give one of {', '.join(known)}")
    return read_command(name, words, inner.make_context(name, list(words), parent=context).params)


def _inner(context: typer.Context, name: str) -> Any:
    return context.find_root().command.commands.get(name)  # type: ignore[attr-defined]


def _dry_run(context: typer.Context, parsed: Command, request: JobRequest) -> None:
    """Execute the dry run of what will be sent; without the data a plan cannot be checked."""
    from dml_dist.jobs.submit import data_is_here

    unchecked = "the run is not on this machine"
    if parsed.name != "evaluate":
        inner = _inner(context, parsed.name)
        words = [*request.arguments[1:], "--dry-run"]
        try:
            inner.invoke(inner.make_context(parsed.name, words, parent=context))
            return
        except DataError as error:
            if data_is_here(parsed):
                raise
            unchecked = str(error)
    elif parsed.config is not None:
        return
    _say(f"the plan could not be checked here: {unchecked}")


@job_app.command("list")
def job_list() -> None:
    """List the jobs that were submitted from the current folder."""
    from dml_dist.jobs.build_target import build_target
    from dml_dist.jobs.follow import status_of
    from dml_dist.jobs.records import JobRecords

    records = JobRecords()
    table = Table("job", "target", "state", "submitted, UTC")
    table.add_column("command", overflow="fold")
    silent: list[dict[str, object]] = []  # Each target that does not answer is asked once.
    found = [records.read(id) for id in records.ids()]
    for record in sorted(found, key=lambda record: record.submitted):
        id = record.request.id
        state = "unknown"
        if record.job is not None and record.target not in silent:
            try:
                state = status_of(record, build_target(record.target)[1], records).state
            except DmlDistError as error:
                silent.append(record.target)
                _say(f"{id}: {error}")
        words = shlex.join(record.request.arguments[:2])
        when = record.submitted[:16].replace("T", " ")
        table.add_row(id, str(record.target["target"]), state, when, words)
    console.print(table)


@job_app.command("status")
def job_status(id: IdArgument) -> None:
    """Show the state of a job; of a failed one also the end of its log."""
    from dml_dist.jobs.follow import job_of, status_of

    record, target, records = _read(id)
    status = status_of(record, target, records)
    request = record.request
    facts = {
        "state": status.state,
        "detail": status.detail,
        "exit code": status.exit_code,
        "submitted": record.submitted,
        "target": f"{record.target['target']}, as {record.job}",
        "command": shlex.join(request.arguments),
        "run folder": request.run_dir,
    }
    for label, value in facts.items():
        if value is not None:
            _say(f"{label + ':':<12}{value}")
    if status.state == "failed":
        try:
            lines = "".join(target.logs(job_of(record), follow=False)).splitlines()
        except DmlDistError as error:  # The state is known from the record.
            lines = [str(error)]
        _say("\n".join(["end of the log:", *lines[-_LINES_OF_A_FAILED_JOB:]]))


@job_app.command("logs")
def job_logs(
    id: IdArgument,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job ends; returns its exit code.")
    ] = False,
) -> None:
    """Print the output of a job."""
    from dml_dist.jobs.follow import follow as follow_job
    from dml_dist.jobs.follow import job_of

    record, target, records = _read(id)
    if follow:
        raise typer.Exit(follow_job(record, target, records, console))
    for text in target.logs(job_of(record), follow=False):
        sys.stdout.write(text)


@job_app.command("stop")
def job_stop(id: IdArgument) -> None:
    """Stop a job: a training saves a checkpoint first."""
    from dml_dist.jobs.follow import job_of

    record, target, _ = _read(id)
    _say(f"{id}: {target.stop(job_of(record))}")


def _read(id: str) -> tuple[JobRecord, Target, JobRecords]:
    from dml_dist.jobs.build_target import build_target
    from dml_dist.jobs.records import JobRecords

    records = JobRecords()
    record = records.read(id)
    return record, build_target(record.target)[1], records


def _say(text: str) -> None:
    say(console, text)
