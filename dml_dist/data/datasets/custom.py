"""Custom importers, loaded by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dml_dist.config.custom import call_target
from dml_dist.config.data import CustomDatasetConfig
from dml_dist.data.sample import DatasetFacts, Sample
from dml_dist.errors import ConfigError


@dataclass(frozen=True)
class CustomImporter:
    """Wraps `target(**options)`, an object with `samples()` and optionally `facts()`."""

    config: CustomDatasetConfig

    def samples(self) -> Sequence[Sample]:
        """Return the user's samples."""
        samples: Sequence[Sample] = self._target.samples()
        return samples

    def facts(self) -> DatasetFacts | None:
        """Return the user's facts; None when the object has none."""
        if not hasattr(self._target, "facts"):
            return None
        facts: DatasetFacts | None = self._target.facts()
        return facts

    @cached_property
    def _target(self) -> Any:
        try:
            made = call_target(self.config.target, options=self.config.options)
        except TypeError as error:
            raise ConfigError(
                f"data.dataset.options must be arguments of {self.config.target}, "
                f"got {sorted(self.config.options)}: {error}"
            ) from error
        if not hasattr(made, "samples"):
            raise ConfigError(
                f"data.dataset.target must give an object with samples(), {self.config.target} "
                f"gave {type(made).__name__}"
            )
        return made
