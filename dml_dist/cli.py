"""The command line: each subcommand calls one function.

Heavy libraries are imported inside the subcommands, so that `--help` is fast. Exit codes:
0 success, 1 the run failed or was stopped (its last checkpoint, if any, is kept), 2 invalid input.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from dml_dist.cli_data import Commands, console, data_app
from dml_dist.cli_jobs import SUBMIT_SETTINGS, job_app, submit
from dml_dist.cli_options import (
    ConfigArgument,
    LauncherOption,
    RunDirOption,
    SetOption,
    WorkersOption,
    overrides_of,
)
from dml_dist.cli_studies import compare, scale, tune
from dml_dist.errors import DmlDistError, RunStopped
from dml_dist.import_path import put_current_folder_last
from dml_dist.terminal import log_to, open_console, say_styled
from dml_dist.urls import output_path

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distributed training and exact evaluation of image embeddings.",
)
app.add_typer(data_app, name="data")
app.add_typer(job_app, name="job")
app.command()(compare)
app.command()(tune)
app.command()(scale)
app.command(context_settings=SUBMIT_SETTINGS)(submit)

error_console = open_console(stderr=True)

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM ended."""

_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def main() -> None:
    """Run the command line and end the process with its exit code."""
    # Imported libraries are hundreds of thousands of objects that stay. Looking for garbage among
    # them, again and again and once more at the end, would take a fifth of a short command's time.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    put_current_folder_last()
    log_to(error_console)
    faulthandler.enable()  # When a library aborts the process, print what its threads were doing.
    # SIGTERM ends a command like Ctrl-C; `train` installs its own handlers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = _run()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_rank(code)
    gc.freeze()
    raise SystemExit(code)


def _run() -> int:
    """Run the command line and return the exit code."""
    try:
        app()
    except RunStopped as stop:
        if os.environ.get("RANK", "0") == "0":
            console.print(str(stop), highlight=False, markup=False, soft_wrap=True)
        return stop.exit_code
    except DmlDistError as error:
        say_styled(error_console, "error:", "bold red", str(error))
        return error.exit_code
    except OSError as error:
        say_styled(error_console, "error:", "bold red", str(error))
        return 1
    except SystemExit as end:
        if end.code == INTERRUPTED:
            error_console.print(
                "interrupted; repeat the command to continue an import, "
                "or repeat it (with --resume for a run or a comparison) to continue"
            )
        return int(end.code or 0)
    return 0


def _end_rank(code: int) -> NoReturn:
    """End one of torchrun's ranks at once, without finalizing the interpreter.

    A gloo thread may still hold tensors of the last collective. If it releases them while the
    interpreter is finalized, it cannot acquire the GIL and aborts the process: the rank would count
    as failed although its work is done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.command()
def quickstart(
    run_dir: RunDirOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of ranks.")] = 2,
    changes: SetOption = None,
) -> None:
    """Import glyphs, train on two Ray workers, evaluate and write a report, in a few minutes."""
    from dml_dist.orchestration.train import run_quickstart

    run_quickstart(console, run_dir=run_dir, overrides=overrides_of(changes, None, workers))


@app.command()
def train(
    config: ConfigArgument,
    changes: SetOption = None,
    run_dir: RunDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved plan and exit.")
    ] = False,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Train the run that CONFIG describes, and evaluate it on the test classes at the end."""
    from dml_dist.config.load import load_config
    from dml_dist.orchestration.train import dry_run_table, run_training

    resolved = load_config(config, overrides_of(changes, launcher, workers))
    if dry_run:
        dry_run_table(resolved, console)
        return
    run_training(resolved, console, run_dir=run_dir, resume=resume)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    split: Annotated[str, typer.Option("--split", help="Split of the index.")] = "test",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="best, last, or the folder of a checkpoint.")
    ] = "best",
    changes: SetOption = None,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Evaluate a run's checkpoint on a split, with the run's own configuration."""
    from dml_dist.orchestration.evaluate import run_evaluation

    run_evaluation(
        run,
        console,
        split=split,
        checkpoint=checkpoint,
        overrides=overrides_of(changes, launcher, workers),
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or study.")],
) -> None:
    """Write the report page of a run or study again."""
    from dml_dist.runs.code_note import say_if_code
    from dml_dist.runs.comparison import ComparisonFolder
    from dml_dist.runs.scaling import ScaleFolder
    from dml_dist.runs.tuning import TuningFolder

    say_if_code(folder, console)

    if TuningFolder(folder).config_path.is_file():
        from dml_dist.studies.tune_page import write_tuning

        page = write_tuning(folder)
    elif ComparisonFolder(folder).config_path.is_file():
        from dml_dist.report.study.comparison import write_comparison

        page = write_comparison(folder)
    elif ScaleFolder(folder).config_path.is_file():
        from dml_dist.studies.scale.study import write_scaling

        page = write_scaling(folder)
    else:
        from dml_dist.report import write_report

        page = write_report(folder)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[
        Path,
        typer.Option("--out", parser=output_path, metavar="BUNDLE", help="Folder to create."),
    ],
    split: Annotated[
        str, typer.Option("--split", help="Split that provides the gallery images.")
    ] = "test",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="best, last, or the folder of a checkpoint.")
    ] = "best",
    thumbnails_mb: Annotated[
        float, typer.Option("--thumbnails-mb", min=0, help="Maximum size of all thumbnails in MiB.")
    ] = 200.0,
    changes: SetOption = None,
) -> None:
    """Export a run's network as ONNX with a searchable gallery, in a self-contained folder."""
    from dml_dist.export.export import ExportOptions, run_export

    options = ExportOptions(split, checkpoint, thumbnails_mb)
    run_export(run, out, console, options, overrides=overrides_of(changes, "inprocess", None))


@app.command()
def search(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Exported folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Number of neighbors per image.")] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=output_path,
            metavar="FILE",
            help="New PNG file; default search.png or search-N.png.",
        ),
    ] = None,
    runtime: Annotated[
        Literal["auto", "onnxruntime", "torch"],
        typer.Option("--runtime", help="Runtime that computes the embeddings."),
    ] = "auto",
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the custom code that the bundle names, if any.")
    ] = False,
) -> None:
    """Find the gallery images nearest to the given images; print a table and write a PNG."""
    from dml_dist.export.search import run_search

    run_search(bundle, images, console, top=top, out=out, runtime=runtime, trust=trust)


@app.command("check-loss")
def check_loss(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Name of a loss, or package.module:name.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Option of the loss; repeatable."),
    ] = None,
) -> None:
    """Check that a loss has the same gradients on 1, 2 and 3 ranks as in one process."""
    from dml_dist.orchestration.check_loss import check_loss as run_check

    run_check(target, options or [], console)


@app.command()
def config(
    explain: Annotated[
        str, typer.Option("--explain", metavar="PATH", help="Field or section, e.g. optim.lr.")
    ],
) -> None:
    """Explain a field of the configuration: meaning, type, default and choices."""
    from dml_dist.config.explain import explain as explain_path

    console.print(explain_path(explain), highlight=False, markup=False)
