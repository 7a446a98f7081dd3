"""`dml-dist scale`: measure the points of a scaling study, write its tables and its page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dml_dist.config.load import with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.errors import DmlDistError, RunError, RunStopped
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.report.parts import try_to_write
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.scaling import ScaleFolder, scale_section
from dml_dist.runtime.datasets import warn_of_secrets
from dml_dist.runtime.progress import Display, Emit, note, phase
from dml_dist.studies.pool import execute_run
from dml_dist.studies.scale.ask import answer, print_answer
from dml_dist.studies.scale.execute import (
    Metrics,
    config_of,
    delete_checkpoints,
    execute_alone,
)
from dml_dist.studies.scale.grid import Sizes
from dml_dist.studies.scale.load import LoadMeter
from dml_dist.studies.scale.measure import Record, measured_records, with_measurements
from dml_dist.studies.scale.page import write_scale_page
from dml_dist.studies.scale.plan import PlannedPoint, plan_points, prepare_shards
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.print import print_plan, print_points, progress_line
from dml_dist.studies.scale.table import read_points, write_points

Execute = Callable[[RunConfig, Path], Metrics]


def run_scaling(
    config: RunConfig, console: Console, *, run_dir: Path | None = None, resume: bool = False
) -> Path:
    """Measure the points of a study, or those that are left, and return its folder.

    Args:
        config: A run's configuration with the section `scale`.
        console: Where progress and the table go.
        run_dir: The study's folder; None is runs/NAME.
        resume: Continue the study in the folder, instead of refusing one that exists.

    Raises:
        DmlDistError: If configuration or data are wrong, before anything starts; or if a point
            failed, after all others were measured.
    """
    config = with_absolute_paths(config)
    scale_section(config)
    folder = ScaleFolder((run_dir or Path("runs") / config.name).absolute())
    folder.check(config, resume=resume)
    planned = plan_points(config)
    warn_of_secrets(config, console)
    with folder.lock():
        folder.check(config, resume=resume)  # Again: another command may have been faster.
        folder.write_config(config)
        planned = prepare_shards(config, planned, console)
        study = _Study(config, folder, planned)
        with Display(console) as emit:
            try:
                study.measure(emit)
            except KeyboardInterrupt:
                raise RunStopped(
                    f"{config.name} was interrupted; the points measured so far are kept"
                ) from None
        points = study.points
        page = try_to_write(write_scaling, folder.path)
    print_points(points, console)
    if page is not None:
        console.print(f"report:  {page}", highlight=False, soft_wrap=True)
    failed = [point.name for point in points if point.status == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(points)} points failed ({', '.join(failed)}), the others are "
            f"in {folder.path}; fix the cause, then repeat the command with --resume"
        )
    console.print(f"results: {folder.path}", highlight=False, soft_wrap=True)
    return folder.path


def dry_run_scaling(config: RunConfig, console: Console) -> None:
    """Print the points of a study and what they cost; nothing is written or started."""
    config = with_absolute_paths(config)
    print_plan(plan_points(config), console)


def ask_scaling(
    question: str, config: RunConfig, console: Console, *, run_dir: Path | None = None
) -> None:
    """Answer a question from the points of a study that was measured; nothing is run.

    Args:
        question: Such as "gpus=64 classes=10000000".
        config: The study's configuration.
        console: Where the answer goes.
        run_dir: The study's folder; None is runs/NAME. Without a study in it there are no points.

    Raises:
        ConfigError: If the folder holds a study of another configuration, or the question cannot
            be answered.
    """
    config = with_absolute_paths(config)
    folder = ScaleFolder((run_dir or Path("runs") / config.name).absolute())
    if folder.config_path.is_file():
        folder.check(config, resume=True)
    print_answer(answer(question, read_points(folder), config), console)


def write_scaling(path: Path) -> Path:
    """Write the page of the study in a folder, and return it."""
    folder = ScaleFolder(path)
    return write_scale_page(path, read_points(folder), folder.config())


class _Study:
    """The points of a study while they are measured; writes their tables after each one."""

    def __init__(
        self, config: RunConfig, folder: ScaleFolder, planned: Sequence[PlannedPoint]
    ) -> None:
        self._config = config
        self._section = scale_section(config)
        self._folder = folder
        self._planned = list(planned)
        self._points = {one.point.name: one.point for one in planned}
        for point in read_points(folder):
            if point.measured and self._points[point.name].status != "refused":
                self._points[point.name] = point

    @property
    def points(self) -> list[ScalePoint]:
        """All points, in order."""
        return list(self._points.values())

    def measure(self, emit: Emit) -> None:
        """Measure what is left: one rank alone, before Ray's processes take their share."""
        write_points(self._folder, self.points)
        left = [one for one in self._planned if self._is_left(self._points[one.point.name])]
        alone = [one for one in left if one.sizes.world_size == 1]
        several = [one for one in left if one.sizes.world_size > 1]
        done = len(self._planned) - len(left)
        launch = self._config.launch.model_copy(
            update={
                "num_workers": max((one.sizes.world_size for one in several), default=1),
                "min_workers": None,
            }
        )
        for part, execute in ((alone, execute_alone), (several, execute_run)):
            with cluster(launch) if part and part is several else contextlib.nullcontext():
                for one in part:
                    emit(phase("points", done, len(self._planned), one.point.name))
                    self._measure(one, execute, emit)
                    done += 1
        emit(phase("points", done, len(self._planned)))

    def _is_left(self, point: ScalePoint) -> bool:
        again = point.noisy and point.tries < self._section.tries
        return point.status == "waiting" or again

    def _measure(self, planned: PlannedPoint, execute: Execute, emit: Emit) -> None:
        """Measure a point until it is quiet; the quietest of its tries counts."""
        name = planned.point.name
        while self._is_left(self._points[name]):
            best = self._points[name]
            try:
                point = self._try(planned, execute, best)
            except RunStopped:
                raise
            except DmlDistError as error:
                point = replace(best, status="failed", problem=str(error), tries=best.tries + 1)
            emit(note(progress_line(point)))
            if best.measured and not point.load < best.load:
                point = replace(best, tries=point.tries)
            self._points[name] = point
            write_points(self._folder, self.points)

    def _try(self, planned: PlannedPoint, execute: Execute, best: ScalePoint) -> ScalePoint:
        """Measure a point once; the folder of its run holds the quietest try afterwards."""
        name = planned.point.name
        final, new = self._folder.run(name), self._folder.run(f".{name}")
        shutil.rmtree(new, ignore_errors=True)
        with config_of(self._config, planned) as config, LoadMeter() as meter:
            metrics = execute(config, new)
        delete_checkpoints(new)
        run = RunFolder(new)
        start, records = measured_records(run, planned.course)
        load = meter.load(start, records[-1]["time"])
        point = replace(
            planned.point,
            tries=best.tries + 1,
            load=load,
            noisy=load > self._section.max_load,
            device=run.info().attempts[-1].device.partition(" x ")[2].partition(" (")[0],
        )
        reference = records if planned.sizes.world_size == 1 else self._reference(planned)
        point = with_measurements(point, planned.course, records, metrics, reference)
        if not best.measured or point.load < best.load:
            shutil.rmtree(final, ignore_errors=True)
            new.rename(final)
        else:
            shutil.rmtree(new)
        return point

    def _reference(self, planned: PlannedPoint) -> list[Record] | None:
        """Return the records of the run of one rank on the same batches, if it was measured."""
        for one in self._planned:
            is_same = _batches(one.sizes) == _batches(planned.sizes)
            if is_same and one.sizes.world_size == 1 and self._points[one.point.name].measured:
                folder = RunFolder(self._folder.run(one.point.name))
                with contextlib.suppress(RunError):  # Somebody removed it.
                    return measured_records(folder, one.course)[1]
        return None


def _batches(sizes: Sizes) -> Sizes:
    """Return sizes without those that change neither batches nor losses."""
    return replace(sizes, world_size=1, proxies="sharded", loader_workers=0, remote=False)
