"""Tasks of ranks and their errors, as values that can be sent between processes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from dml_dist import errors
from dml_dist.config.schema import RunConfig
from dml_dist.errors import DmlDistError, RunError


@dataclass(frozen=True)
class Assignment:
    """One task for a group of ranks.

    Attributes:
        kind: Train (and evaluate at the end), or evaluate a checkpoint.
        config: The run's configuration; paths in it are absolute.
        run_dir: The run folder, absolute.
        command: The command line, for run.json.
        changes: Resumable fields that differ from the run's own, `path: old -> new`.
        reason: Why the ranks are started again; empty for a first start.
        split: Evaluate: the split to embed.
        checkpoint: Evaluate: `best`, `last` or the folder of a checkpoint.
        untrained_dir: Train: folder in which the runs of a study share the metrics of untrained
            networks; None measures them for this run.
    """

    kind: Literal["train", "evaluate"]
    config: RunConfig
    run_dir: str
    command: str = ""
    changes: tuple[str, ...] = ()
    reason: str = ""
    split: str = "test"
    checkpoint: str = "best"
    untrained_dir: str | None = None

    def to_json(self) -> str:
        """Return the assignment as text; `from_json` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(values | {"config": self.config.model_dump(mode="json")})

    @staticmethod
    def from_json(text: str) -> Assignment:
        """Return the assignment that `to_json` wrote."""
        values = json.loads(text)
        config = RunConfig.model_validate_json(json.dumps(values.pop("config")))
        changes = tuple(values.pop("changes"))
        return Assignment(config=config, changes=changes, **values)


def fatal_event(error: DmlDistError, rank: int) -> dict[str, Any]:
    """Return the event by which a rank reports an error that a restart would not fix."""
    return {"kind": "fatal", "error": type(error).__name__, "message": str(error), "rank": rank}


def rebuild_error(event: dict[str, Any]) -> DmlDistError:
    """Return the error that a fatal event describes."""
    kind = getattr(errors, event["error"], RunError)
    return kind(event["message"])
