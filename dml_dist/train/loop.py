"""The training loop, one for all launchers: steps, records, validations, checkpoints.

Every rank calls `train`. What happens at a step depends on the plan and the configuration alone,
so all ranks meet in the same collectives. `evaluate` and `report` come from outside. Whether to
stop early is agreed by all ranks (`StopChecks`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from dml_dist.config.schema import RunConfig
from dml_dist.data.loader import Batch, worker_death
from dml_dist.errors import DivergedError, RunError
from dml_dist.parallel.comm import Comm
from dml_dist.random_streams import Stream, seed_of
from dml_dist.train.checkpoint import delete_interrupted, load_checkpoint, save_checkpoint
from dml_dist.train.checkpoint_choice import find_checkpoint, restore_best
from dml_dist.train.checkpoint_files import Best, Manifest
from dml_dist.train.dynamic_assignment import SharedProxyWarning
from dml_dist.train.hooks import ProgressEvent, TrainHooks, TrainResult
from dml_dist.train.meter import EmbeddingNorms, Meter, Reading
from dml_dist.train.optim import learning_rate_factor
from dml_dist.train.projections import build_projections
from dml_dist.train.resume import check_plan, check_resume
from dml_dist.train.run_plan import RunPlan
from dml_dist.train.spans import Spans
from dml_dist.train.state import TrainState, build_state, check_finite, share_buffers
from dml_dist.train.step import train_step
from dml_dist.train.stopping import StopChecks


def train(
    config: RunConfig, plan: RunPlan, comm: Comm, hooks: TrainHooks, *, resume: bool = False
) -> TrainResult:
    """Train until the plan's last step, or until `hooks.stop_reason` gives a reason to stop.

    Every rank calls this. A run that stops has written a checkpoint of its last step.

    Args:
        config: The run's configuration.
        plan: Its resolved plan.
        comm: The ranks.
        hooks: Inputs, outputs and callbacks.
        resume: Continue from the newest whole checkpoint, if there is one.

    Raises:
        CheckpointError: If the checkpoint does not fit the configuration or the plan.
        DivergedError: If loss, embeddings, gradients or weights are not finite.
        RunError: If a rank or loader worker was lost.
    """
    start = time.monotonic()
    found = find_checkpoint(hooks.checkpoints, comm) if resume else None
    changes = check_resume(*found, config) if found else []
    if found:
        check_plan(*found, config, plan)
    state = build_state(
        config,
        num_classes=plan.num_classes,
        comm=comm,
        pretrained=found is None,
        class_sizes=plan.class_sizes,
    )
    if config.projections is not None:
        assert hooks.projections is not None
        state.projections = build_projections(
            config.projections, hooks.projections, state.objective, state.optimizer
        )
    loop = _Loop(config, plan, state, hooks)
    if found:
        loop.resume_from(*found)
    elif state.projections is not None:
        state.projections.begin(state.model)
    start_step = state.step
    stopped = loop.run()
    assert loop.last is not None
    return TrainResult(
        state=state,
        start_step=start_step,
        best=loop.best,
        last=loop.last,
        changes=tuple(changes),
        seconds=time.monotonic() - start,
        stopped=stopped,
    )


class _Loop:
    """State of the loop outside of TrainState: best and last checkpoint, meters, stop checks."""

    def __init__(
        self, config: RunConfig, plan: RunPlan, state: TrainState, hooks: TrainHooks
    ) -> None:
        self.config = config
        self.plan = plan
        self.state = state
        self.hooks = hooks
        self.best: Best | None = None
        self.last: Path | None = None
        self.stop_checks = StopChecks(
            hooks.stop_reason, state.comm, every_minutes=config.checkpoint.every_minutes
        )
        self.meter = Meter()
        self.norms = EmbeddingNorms()
        self.shared_proxy = SharedProxyWarning()
        record = config.train.record_spans
        self.spans = Spans.on(state.comm.device) if record else Spans.off()
        if state.comm.world_size > 1:
            self.spans.watch_gradients(state.model)

    def resume_from(self, folder: Path, manifest: Manifest) -> None:
        """Load a checkpoint."""
        load_checkpoint(folder, manifest, self.state)
        self.best = restore_best(self.hooks.checkpoints, manifest.best, self.state.comm)
        self.last = folder
        # Not left to the next save: a run that has made all its steps saves nothing more.
        if self.state.comm.topology.is_main:
            delete_interrupted(self.hooks.checkpoints)

    def run(self) -> str | None:
        """Make the remaining steps; return why the run stopped early, if it did."""
        state, plan = self.state, self.plan
        self._report(None, 0.0)
        if self.state.comm.topology.is_main and state.step < plan.total_steps:
            self.hooks.begin(state.step)
        self.meter.restart()
        self.stop_checks.restart(state.step)
        if not plan.total_steps and self.last is None:
            if plan.num_validation_classes:
                self._is_best(0, self._validate(0)["map_at_r"])
            self._save()
        batches = iter(self._batches())
        try:
            while state.step < plan.total_steps:
                waiting = time.perf_counter()
                with self.spans("data"):
                    batch = next(batches)
                self._step(batch, time.perf_counter() - waiting)
                if (reason := self._after_step()) is not None:
                    return reason
            # For requests since the last check: the final evaluation is long and does not ask.
            return self.stop_checks.check(state.step)
        except RuntimeError as error:
            if (death := worker_death(error)) is None:
                raise
            raise death from error

    # ------------------------------------------------------------ one step

    def _batches(self) -> Iterator[Batch]:
        if self.state.step < self.plan.total_steps:
            yield from self.hooks.batches(self.state.step, self.plan.total_steps)

    def _step(self, batch: Batch, data_seconds: float) -> None:
        state, config = self.state, self.config
        step = state.step
        sizes = self.plan.batch_sizes(step)
        if batch.step != step or len(batch.labels) != sizes[state.comm.rank]:
            raise RunError(
                f"rank {state.comm.rank} expected batch {step} with {sizes[state.comm.rank]} "
                f"images, but the loader returned batch {batch.step} with {len(batch.labels)}; "
                "create the loader and the plan from the same data and configuration"
            )
        if (projections := state.projections) and projections.begins(step):
            start = time.perf_counter()
            share_buffers(state.model, state.comm)  # All ranks embed the rows of a table.
            projections.start_problem(state.model, step)
            self.meter.leave_out(time.perf_counter() - start)
        self._seed(step)
        with self.spans("data"):
            images, labels = self._on_device(batch)
        output = train_step(
            state,
            images,
            labels,
            sizes,
            learning_rate_factor=self._factor(step),
            max_grad_norm=config.train.max_grad_norm,
            micro_batch_size=config.train.micro_batch_size,
            update_backbone=step >= config.train.backbone_warmup_epochs * self.plan.steps_per_epoch,
            is_representative=self._representatives(batch),
            neighbors=projections.neighbors(step) if projections else None,
            image_rows=self._image_rows(batch),
            proximal=projections.term if projections else None,
            spans=self.spans,
        )
        values = dict(output.statistics)
        if output.gradient_norm is not None:
            values["gradient_norm"] = output.gradient_norm
        self.meter.add(values, output.finite_gradients, sum(sizes), data_seconds)
        self.norms.add(batch.rows, output.embedding_norms)

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and class ids of a batch on this rank's device."""
        device, dtype = self.state.comm.device, self.state.precision.dtype
        labels = torch.from_numpy(self.hooks.class_ids(batch.labels.numpy()))
        images = batch.images.to(device, dtype, non_blocking=True)
        return images, labels.to(device, non_blocking=True)

    def _representatives(self, batch: Batch) -> torch.Tensor | None:
        """Return which images of a batch are representatives; None when all pairs count."""
        if self.state.projections is None:
            return None
        found = self.state.projections.is_representative(batch.rows.numpy(), batch.step)
        return None if found is None else torch.from_numpy(found).to(self.state.comm.device)

    def _image_rows(self, batch: Batch) -> torch.Tensor | None:
        """Return the index rows of a batch where the objective asks for them."""
        device = self.state.comm.device
        return batch.rows.to(device) if self.state.objective.needs_image_rows else None

    def _seed(self, step: int) -> None:
        """Make what the network draws depend on seed, step and rank: a resumed run repeats it."""
        comm = self.state.comm
        seed = seed_of(Stream.NETWORK, self.config.seed, step, comm.rank)
        # torch.manual_seed asks every kind of device: 0.25 ms, 1 % of a small step.
        torch.default_generator.manual_seed(seed)
        if comm.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _factor(self, step: int) -> float:
        return learning_rate_factor(
            self.config.schedule,
            step,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
        )

    # ------------------------------------------------------------ between steps

    def _after_step(self) -> str | None:
        """Log, validate and save where due; return why to stop, if so. All ranks decide alike."""
        step = self.state.step
        checks = self.stop_checks.is_due(step)
        reason = self.stop_checks.check(step) if checks else None
        validates = self._validates(step)
        saves = self._saves(step) or (checks and self.stop_checks.save_is_due)
        projections = self.state.projections
        prepares = projections is not None and projections.prepares_after(step)
        pauses = saves or validates or self._tests(step) or prepares or reason is not None
        # A record at every pause, too: nothing is measured or saved after a bad loss, and no record
        # of a resumed run needs steps from before the checkpoint.
        if pauses or step % self.config.train.log_every == 0:
            self._log(step)
        if not pauses:
            return None
        share_buffers(self.state.model, self.state.comm)
        check_finite(self.state, self._kept())
        metrics = self._validate(step) if validates else None
        map_at_r = float(metrics["map_at_r"]) if metrics else None
        improved = map_at_r is not None and self._is_best(step, map_at_r)
        if self._tests(step):
            tested = self._measure("test", step)
            self._write_evaluation(step, "test", tested, protocol="literature")
        if projections is not None:
            # Before the checkpoint, which must hold the state that the loader will follow.
            projections.after_step(self.state.model, step, map_at_r)
        if reason is None and metrics is not None:
            reason = self.stop_checks.check(step, metrics)
        if saves or improved or reason is not None:
            self._save()
        self.meter.restart()
        self.stop_checks.restart(step)
        return reason

    def _validates(self, step: int) -> bool:
        if not self.plan.num_validation_classes:
            return False
        every = self.config.evaluation.every_steps or self.plan.steps_per_epoch
        return step % every == 0 or step == self.plan.total_steps

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        if every is None and self.plan.num_validation_classes:
            return self._validates(step)
        every = every or self.plan.steps_per_epoch
        return step % every == 0 or step == self.plan.total_steps

    def _tests(self, step: int) -> bool:
        every = self.config.evaluation.evaluate_test_every
        return every is not None and step % every == 0

    def _log(self, step: int) -> None:
        num_steps = self.meter.num_steps
        first = step - num_steps + 1
        reading = self.meter.read(self.state.comm)
        values = reading.values | self.spans.read(num_steps)
        if self.state.projections is not None:
            values |= self.state.projections.record(self.state.model)
        if self.hooks.step_records is not None:
            lr = self.config.optim.lr * self._factor(step - 1)
            self.hooks.step_records.write(
                step,
                epoch=step / self.plan.steps_per_epoch,
                samples_seen=self.plan.samples_seen(step),
                lr=lr,
                **values,
                **self.hooks.machine(),
            )
        if self.state.comm.topology.is_main:
            self.shared_proxy.see(step, num_steps, values)
        self._report(values["loss"], values["images_per_second"])
        if reading.first_bad is not None:
            raise self._non_finite(step, first, reading)
        self.norms.steps.clear()

    def _kept(self) -> str:
        return f"{self.last} is kept" if self.last else "there is no checkpoint yet"

    def _non_finite(self, step: int, first: int, reading: Reading) -> DivergedError:
        """Return the error for a non-finite loss or gradient; every rank calls this."""
        assert reading.first_bad is not None
        row, norm = self.norms.worst(reading.first_bad, self.state.comm)
        parts = ", ".join(f"{name} {value:.6g}" for name, value in reading.bad_values.items())
        what = "gradients are" if math.isfinite(reading.bad_values["loss"]) else "loss is"
        return DivergedError(
            f"the {what} not finite at step {first + reading.first_bad} "
            f"(noticed at step {step}): {parts}; the worst sample is "
            f"{self.hooks.name_of_row(row)}, whose embedding has norm {norm:.6g}. "
            f"Lower the learning rate or set train.max_grad_norm; {self._kept()}"
        )

    def _report(self, loss: float | None, images_per_second: float) -> None:
        if self.state.comm.topology.is_main:
            event = ProgressEvent(self.state.step, self.plan.total_steps, loss, images_per_second)
            self.hooks.report(event)

    def _validate(self, step: int) -> dict[str, float]:
        """Evaluate the validation classes and return the metrics."""
        metrics = self._measure("validation", step)
        self._write_evaluation(step, "validation", metrics, protocol="validation")
        return metrics

    def _is_best(self, step: int, map_at_r: float) -> bool:
        """Return whether this validation is the best so far; keeps it if so."""
        if math.isnan(map_at_r) or (self.best is not None and map_at_r <= self.best.map_at_r):
            return False
        self.best = Best(self._manifest().folder, step, map_at_r)
        return True

    def _measure(self, split: Literal["validation", "test"], step: int) -> dict[str, float]:
        model = self.state.model.eval()
        try:
            return self.hooks.evaluate(model, split, step)
        finally:
            model.train()

    def _write_evaluation(
        self, step: int, split: str, metrics: dict[str, float], *, protocol: str
    ) -> None:
        if self.hooks.evaluation_records is not None:
            self.hooks.evaluation_records.write(step, split=split, protocol=protocol, **metrics)

    def _save(self) -> None:
        start = time.monotonic()
        self.last = save_checkpoint(
            self.hooks.checkpoints,
            self.state,
            self._manifest(),
            keep=self.config.checkpoint.keep,
        )
        self.stop_checks.saved()
        if self.hooks.checkpoint_records is not None:
            seconds = time.monotonic() - start
            self.hooks.checkpoint_records.write(self.state.step, seconds=seconds)

    def _manifest(self) -> Manifest:
        step, plan = self.state.step, self.plan
        return Manifest(
            step=step,
            epoch=step // plan.steps_per_epoch,
            samples_seen=plan.samples_seen(step),
            total_steps=plan.total_steps,
            attempt=self.hooks.attempt,
            world_size=plan.world_size,
            num_classes=plan.num_classes,
            num_images=plan.num_images,
            config=self.config.model_dump(mode="json"),
            best=self.best,
        )
