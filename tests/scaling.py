"""A small scaling study, and runs of its points that are made up instead of trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml_dist.config.load import dump_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter
from dml_dist.studies.scale.points import SPANS


def scale_config(folder: Path, *overrides: str, **sweeps: dict[str, Any]) -> RunConfig:
    """Return a study of glyphs below a folder; by default of 16 and 40 classes on one rank."""
    return parse_config(
        {
            "name": "study",
            "data": {
                "path": str(folder / "data"),
                "dataset": {
                    "name": "glyphs",
                    "num_classes": 20,
                    "images_per_class": 6,
                    "image_size": 16,
                },
                "transform": {"name": "standard", "size": 16},
                "loader_workers": 0,
            },
            "model": {"backbone": {"name": "conv4", "width": 8}, "embedding_size": 8},
            "train": {"global_batch_size": 8, "steps": 1},
            "validation": {"name": "fraction", "fraction": 0.2},
            "launch": {"launcher": "ray", "num_workers": 1, "threads_per_rank": 1},
            "scale": {
                "sweeps": sweeps or {"classes": {"classes": [16, 40]}},
                "warmup_steps": 2,
                "steps": 4,
                "repetitions": 2,
            },
        },
        overrides,
    )


@dataclass
class MadeUpRuns:
    """Executes nothing: writes the records that a run of a point would have.

    Attributes:
        executed: Names of the runs, in order.
        fail: From the name of a run to the error that it ends with, if any.
        loss: Of all steps, by the number of ranks.
    """

    executed: list[str] = field(default_factory=list)
    fail: Callable[[str], BaseException | None] = lambda name: None
    loss: dict[int, float] = field(default_factory=lambda: {1: 2.0, 2: 2.1})

    def __call__(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        self.executed.append(config.name)
        if (error := self.fail(config.name)) is not None:
            raise error
        folder.parent.mkdir(parents=True, exist_ok=True)
        run = RunFolder.create(folder, dump_config(config), name=config.name, seed=config.seed)
        ranks = config.launch.num_workers
        run.begin_attempt(world_size=ranks, launcher="x", device=f"{ranks} x cpu (1)", command="x")
        steps, every = config.train.steps, config.train.log_every
        assert steps is not None
        with RecordWriter(run.records("steps"), 1) as writer:
            for step in range(every, steps + 1, every):
                writer.write(
                    step,
                    loss=self.loss[ranks],
                    images_per_second=100.0 * ranks,
                    interface_bytes=1000.0 * every,
                    memory_bytes=5e6,
                    **{f"seconds_{name}": 0.001 for name in SPANS},
                )
        return {"validation": {"recall_at_1": 0.5}}
