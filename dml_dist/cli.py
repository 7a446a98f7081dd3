"""The command line: each subcommand calls one function.

Heavy libraries are imported inside the subcommands, so that `--help` answers at once. Exit codes:
0 done, 1 the run failed (its last checkpoint is kept), 2 the request was wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dml_dist.errors import ConfigError, DmlDistError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distributed training and exact evaluation of image embeddings.",
)
data_app = typer.Typer(no_args_is_help=True, help="Import, index and check data sets.")
app.add_typer(data_app, name="data")

console = Console()
error_console = Console(stderr=True)

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a field, e.g. optim.lr=1e-3."),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Run folder; default runs/NAME.")
]
Launcher = Literal["ray", "torchrun", "inprocess"]
LauncherOption = Annotated[
    Launcher | None, typer.Option("--launcher", help="How ranks are started.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Number of ranks under Ray.")
]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        app()
    except DmlDistError as error:
        error_console.print(
            f"[bold red]error:[/] {_escaped(error)}", highlight=False, soft_wrap=True
        )
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        error_console.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            error_console.print(
                "interrupted; repeat the command to go on with an import, "
                "and with --resume to go on with a run or a comparison"
            )
        raise


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def _overrides(
    changes: list[str] | None, launcher: Launcher | None, workers: int | None
) -> list[str]:
    """All changes to a configuration; torchrun's ranks are recognised by their environment."""
    result = list(changes or [])
    if launcher is None and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun"
    if launcher is not None:
        result.append(f"launch.launcher={launcher}")
    if workers is not None:
        result.append(f"launch.num_workers={workers}")
    return result


@app.command()
def quickstart(
    run_dir: RunDirOption = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of ranks.")] = 2,
    changes: SetOption = None,
) -> None:
    """Glyphs, shards, two Ray Train workers, distributed evaluation, report: in some minutes."""
    from dml_dist.orchestration.quickstart import run_quickstart

    run_quickstart(console, run_dir=run_dir, overrides=_overrides(changes, None, workers))


@app.command()
def train(
    config: ConfigArgument,
    changes: SetOption = None,
    run_dir: RunDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved plan and end.")
    ] = False,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Train the run that CONFIG describes, and evaluate it on the test classes at the end."""
    from dml_dist.config.load import load_config
    from dml_dist.orchestration.train import dry_run_table, run_training

    resolved = load_config(config, _overrides(changes, launcher, workers))
    if dry_run:
        dry_run_table(resolved, console)
        return
    run_training(resolved, console, run_dir=run_dir, resume=resume)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    split: Annotated[str, typer.Option("--split", help="Split of the index.")] = "test",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="best, last, or a checkpoint's folder.")
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
        overrides=_overrides(changes, launcher, workers),
    )


@app.command()
def compare(
    config: ConfigArgument,
    changes: SetOption = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of the comparison; default runs/NAME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the comparison where it was stopped.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and what they compute, and end.")
    ] = False,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", min=1, help="Runs side by side, each on one process."),
    ] = None,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Compare methods over seeds at equal steps: a table, convergence curves, one page."""
    from dml_dist.config.load import load_config
    from dml_dist.orchestration.compare import dry_run_comparison, run_comparison

    overrides = _overrides(changes, launcher, workers)
    if parallel is not None:
        overrides.append(f"compare.parallel={parallel}")
    resolved = load_config(config, overrides)
    if dry_run:
        dry_run_comparison(resolved, console)
        return
    run_comparison(resolved, console, run_dir=run_dir, resume=resume)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Write the report page of a run anew."""
    from dml_dist.report import write_report

    console.print(f"report: {write_report(run)}", highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="New folder.")],
    split: Annotated[
        str, typer.Option("--split", help="Split whose images are the gallery.")
    ] = "test",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="best, last, or a checkpoint's folder.")
    ] = "best",
    thumbnails_mb: Annotated[
        float, typer.Option("--thumbnails-mb", min=0, help="Bound on all thumbnails, MiB.")
    ] = 200.0,
    changes: SetOption = None,
) -> None:
    """Write a run's network as ONNX with a searchable gallery, one folder that stands alone."""
    from dml_dist.orchestration.export import ExportOptions, run_export

    options = ExportOptions(split, checkpoint, thumbnails_mb)
    run_export(run, out, console, options, overrides=_overrides(changes, "inprocess", None))


@app.command()
def search(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Exported folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Neighbours of each image.")] = 10,
    out: Annotated[
        Path | None, typer.Option("--out", help="New PNG file; default search.png or search-N.png.")
    ] = None,
    runtime: Annotated[
        Literal["auto", "onnxruntime", "torch"],
        typer.Option("--runtime", help="What computes embeddings."),
    ] = "auto",
) -> None:
    """Show the images of a bundle that are nearest to given ones, as a table and a picture."""
    from dml_dist.orchestration.search_bundle import run_search

    run_search(bundle, images, console, top=top, out=out, runtime=runtime)


@app.command("check-loss")
def check_loss(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A loss's name, or package.module:name.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="One of the loss's options."),
    ] = None,
) -> None:
    """Check that a loss gives one process's gradients on 1, 2 and 3 ranks."""
    from dml_dist.orchestration.check_loss import check_loss as run_check

    run_check(target, options or [], console)


@app.command()
def config(
    explain: Annotated[
        str, typer.Option("--explain", metavar="PATH", help="Field or section, e.g. optim.lr.")
    ],
) -> None:
    """Explain a field of the configuration: meaning, type, default, choices."""
    from dml_dist.config.explain import explain as explain_path

    console.print(explain_path(explain), highlight=False, markup=False)


# ---------------------------------------------------------------- data


@data_app.command("import")
def data_import(
    dataset: Annotated[
        Literal["sop", "cub200", "cars196", "inshop", "folder", "table", "glyphs"],
        typer.Argument(help="Data set."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for tar shards and index.")],
    source: Annotated[
        Path | None, typer.Option("--source", help="Folder or table that is imported.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="train=SHARE", help="Share that trains.")
    ] = None,
    by: Annotated[
        Literal["class", "image"] | None, typer.Option("--by", help="What is divided.")
    ] = None,
    order: Annotated[
        Literal["sorted", "seeded"] | None, typer.Option("--order", help="Order of the division.")
    ] = None,
    split_file: Annotated[
        Path | None, typer.Option("--split-file", help="CSV: path,split or class,split.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", help="Glyphs: number of classes.")
    ] = None,
    images_per_class: Annotated[
        int | None, typer.Option("--images-per-class", help="Glyphs: images of each class.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Glyphs: side in pixels.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of what is drawn.")
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option("--max-side", help="Shrink larger images to this longer side, in pixels."),
    ] = None,
    on_broken: Annotated[
        Literal["raise", "skip"] | None,
        typer.Option("--on-broken", help="Broken images end the import, or are skipped."),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Go on where the official split differs.")
    ] = False,
) -> None:
    """Import a data set: tar shards and one index, continued where it was interrupted."""
    from dml_dist.orchestration.datasets import dataset_from_options, import_to

    options = {
        "source": None if source is None else str(source),
        "num_classes": classes,
        "images_per_class": images_per_class,
        "image_size": image_size,
        "seed": seed,
        "max_side": max_side,
        "on_broken": on_broken,
        "allow_partial": allow_partial or None,
    }
    rule = {
        "train": _share(split),
        "by": by,
        "order": order,
        "file": None if split_file is None else str(split_file),
        "seed": seed,
    }
    import_to(dataset_from_options(dataset, options, rule), out, console)


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        if name != "train":
            raise ValueError
        return float(value)
    except ValueError:
        raise ConfigError(
            f"--split must be train=SHARE with a share between 0 and 1, got {text!r}; "
            "for example --split train=0.5"
        ) from None


@data_app.command("index")
def data_index(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of tar shards.")],
    split: Annotated[
        str, typer.Option("--split", help="Split of samples that do not name theirs.")
    ] = "train",
) -> None:
    """Index tar shards that were made elsewhere (labels from .cls or .json)."""
    from dml_dist.orchestration.datasets import index_folder

    index_folder(folder, split, console)


@data_app.command("verify")
def data_verify(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or URL of shards and index.")
    ],
) -> None:
    """Read every sample and compare it with the index."""
    from dml_dist.orchestration.datasets import verify_folder

    if not verify_folder(folder, console):
        sys.exit(2)


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards and index.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The picture, a new PNG; default DIR-show.png here."),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Tar shards that are shuffled together.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of what is shown.")] = 0,
) -> None:
    """Counts, balance and mixing of a data set, and a picture with some of its images."""
    from dml_dist.orchestration.show import show_dataset

    show_dataset(folder, console, out=out, window=window, seed=seed)
