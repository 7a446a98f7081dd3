"""The subcommands of `dml-dist data`: import, index, verify and show data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dml_dist.errors import ConfigError, RunError
from dml_dist.terminal import open_console
from dml_dist.urls import output_path


class Commands(TyperGroup):
    """The subcommands. They end by typer's own exceptions, never by SystemExit."""

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand; user code that ends the process is an error, not a success."""
        try:
            return super().invoke(ctx)
        except SystemExit as end:
            raise RunError(
                f"A custom target or a library ended the process with exit code {end.code or 0} "
                "before the command was done. Custom code must not call sys.exit."
            ) from end


data_app = typer.Typer(no_args_is_help=True, help="Import, index, verify and show data sets.")
console = open_console()

DataSet = Literal["sop", "cub200", "cars196", "inshop", "folder", "table", "glyphs", "sop_shape"]
SourceOption = Annotated[Path | None, typer.Option("--source", help="Folder or table to import.")]
SplitOption = Annotated[
    str | None, typer.Option("--split", metavar="train=SHARE", help="Share of the training split.")
]
ByOption = Annotated[
    Literal["class", "image"] | None, typer.Option("--by", help="Split by class or by image.")
]
OrderOption = Annotated[
    Literal["sorted", "seeded"] | None,
    typer.Option("--order", help="Order of classes or images before the split."),
]
SplitFileOption = Annotated[
    Path | None, typer.Option("--split-file", help="CSV: path,split or class,split.")
]
ClassesOption = Annotated[int | None, typer.Option("--classes", help="Glyphs: number of classes.")]
ImagesOption = Annotated[
    int | None, typer.Option("--images-per-class", help="Glyphs: images per class.")
]
SizeOption = Annotated[
    int | None, typer.Option("--image-size", help="Drawn images: side in pixels.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Random seed.")]
MaxSideOption = Annotated[
    int | None,
    typer.Option("--max-side", help="Shrink larger images to this longer side in pixels."),
]
OnBrokenOption = Annotated[
    Literal["raise", "skip"] | None,
    typer.Option("--on-broken", help="Raise an error for broken images, or skip them."),
]
PartialOption = Annotated[
    bool,
    typer.Option(
        "--allow-partial", help="Import even if the data differs from the official split."
    ),
]


@data_app.command("import")
def data_import(
    dataset: Annotated[DataSet, typer.Argument(help="Data set.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", parser=output_path, metavar="DIR", help="Folder for tar shards and index."
        ),
    ],
    source: SourceOption = None,
    split: SplitOption = None,
    by: ByOption = None,
    order: OrderOption = None,
    split_file: SplitFileOption = None,
    classes: ClassesOption = None,
    images_per_class: ImagesOption = None,
    image_size: SizeOption = None,
    seed: SeedOption = None,
    max_side: MaxSideOption = None,
    on_broken: OnBrokenOption = None,
    allow_partial: PartialOption = False,
) -> None:
    """Import a data set into tar shards with an index; resumes an interrupted import."""
    from dml_dist.runtime.datasets import dataset_from_options, import_to

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
            f"--split {text!r} is not of the form train=SHARE with a share between 0 and 1; "
            "write for example --split train=0.5"
        ) from None


@data_app.command("index")
def data_index(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of tar shards.")],
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Split of samples without one; by default from the names of folders and tar "
            "files (train, val, test), else train.",
        ),
    ] = None,
    on_broken: OnBrokenOption = None,
) -> None:
    """Index existing tar shards (labels from .cls or .json); decodes every image."""
    from dml_dist.runtime.datasets import index_folder

    index_folder(folder, split, console, on_broken=on_broken or "raise")


@data_app.command("verify")
def data_verify(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or URL of shards and index.")
    ],
) -> None:
    """Read and decode every sample and compare it with the index."""
    from dml_dist.runtime.datasets import verify_folder

    if not verify_folder(folder, console):
        raise typer.Exit(2)


@data_app.command("show")
def data_show(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or URL of shards and index.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=output_path,
            metavar="FILE",
            help="PNG file; default DIR-show.png in the current folder.",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Tar shards shuffled together.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Random seed for choosing images.")
    ] = 0,
) -> None:
    """Show counts, class balance and shuffling of a data set, and write a sheet of images."""
    from dml_dist.report.dataset import show_dataset

    show_dataset(folder, console, out=out, window=window, seed=seed)
