"""Training and evaluation on one rank, composed from the layers below.

Every launcher calls `run_rank` on every rank. It reads everything from the run folder and the
data set, so a rank that is killed and restarted continues from the newest checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dml_dist.config.data import BalancedBatchesConfig
from dml_dist.config.launch import LaunchConfig
from dml_dist.config.model import ModelConfig
from dml_dist.config.schema import RunConfig
from dml_dist.data.index import Index
from dml_dist.data.loader import Batch, train_loader
from dml_dist.data.plans import BatchPlan
from dml_dist.data.systematic import StatefulPlan, SystematicPlan, TrainingRows
from dml_dist.errors import RunError
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel, PooledFeatures
from dml_dist.parallel.comm import Comm
from dml_dist.report.gallery import write_gallery
from dml_dist.runs.artifacts import ClassTable, PerClass, write_class_table
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter, read_records
from dml_dist.runs.study import read_untrained, untrained_digest, write_untrained
from dml_dist.runtime.attempts import begin_attempt
from dml_dist.runtime.context import RunContext
from dml_dist.runtime.fetch import fetch_before_training
from dml_dist.runtime.galleries import NUM_NEIGHBORS, gallery_of
from dml_dist.runtime.loggers import open_loggers
from dml_dist.runtime.machine import MachineMeter
from dml_dist.runtime.nodes import open_on_nodes
from dml_dist.runtime.progress import Emit, discard, note, phase, warnings_as_notes
from dml_dist.runtime.proxy_facts import keep_proxy_facts
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import Assignment
from dml_dist.topology import Topology
from dml_dist.train.checkpoint_choice import load_model, select_checkpoint
from dml_dist.train.checkpoint_files import read_manifest
from dml_dist.train.loop import ProgressEvent, TrainHooks, TrainResult, train
from dml_dist.train.projections import ProjectionInputs
from dml_dist.train.run_plan import RunPlan
from dml_dist.train.state import resolve_precision
from dml_dist.train.stopping import first_reason

# Keys of a record that are not metrics.
_NO_METRICS = ("attempt", "step", "time", "split", "protocol")


def run_rank(
    assignment: Assignment, topology: Topology, comm: Comm, emit: Emit, stop: StopRequest
) -> dict[str, Any]:
    """Execute this rank's share of an assignment; every rank calls it.

    Args:
        assignment: The task.
        topology: Rank, world size and device.
        comm: The collectives of all ranks.
        emit: Receives progress events; only those of rank 0 are forwarded.
        stop: Request to stop training.

    Returns:
        The metrics, the same on every rank except for times; if training stopped early,
        `{"stopped": {"reason": ..., "step": ...}}`.
    """
    _share_cores(assignment.config.launch, topology)
    with warnings_as_notes(emit if topology.is_main else discard):
        context = open_on_nodes(assignment, topology, comm, emit)
        match assignment.kind:
            case "train":
                return _train(assignment, context, stop)
            case "evaluate":
                return _evaluate(assignment, context)


def _share_cores(launch: LaunchConfig, topology: Topology) -> None:
    """Limit threads to this rank's share of the cores; more threads than cores slow all ranks."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(launch.threads_per_rank or max(1, cores // ranks_here))


# ---------------------------------------------------------------- training


def _train(assignment: Assignment, context: RunContext, stop: StopRequest) -> dict[str, Any]:
    start = time.monotonic()
    folder = RunFolder(Path(assignment.run_dir))
    plan = context.resolve()
    steps = evaluations = saves = None
    with ExitStack() as held:
        if context.topology.is_main:
            held.enter_context(folder.writing())
        attempt = begin_attempt(assignment, folder, plan, context)
        fetch_before_training(context.index, context.batch_plan(), context.comm, context.emit)
        if context.topology.is_main:
            loggers = held.enter_context(open_loggers(context.config, folder, attempt))
            steps = held.enter_context(
                RecordWriter(folder.records("steps"), attempt, loggers.of("steps"))
            )
            evaluations = held.enter_context(
                RecordWriter(folder.records("evaluations"), attempt, loggers.of("evaluations"))
            )
            saves = held.enter_context(RecordWriter(folder.records("checkpoints"), attempt))
        hooks = replace(
            _hooks(folder, plan, context, attempt),
            stop_reason=first_reason(lambda step, metrics: stop.reason),
            step_records=steps,
            evaluation_records=evaluations,
            checkpoint_records=saves,
        )
        if context.config.train.record_machine and context.topology.is_main:
            # Now, because memory counts from before the network is built.
            hooks = replace(hooks, machine=MachineMeter(context.topology).read)
        stop.is_training = True
        result = train(context.config, plan, context.comm, hooks, resume=True)
        if result.stopped is not None:
            return {"stopped": {"reason": result.stopped, "step": result.state.step}}
        stop.is_training = False
        measured = _final_results(result, folder, context, assignment.untrained_dir, evaluations)
        seconds = time.monotonic() - start - result.seconds
        return {**measured, "seconds": {"train": result.seconds, "evaluate": seconds}}


def _hooks(folder: RunFolder, plan: RunPlan, context: RunContext, attempt: int) -> TrainHooks:
    """Return the batches, evaluation and display of the training loop."""

    def show(event: ProgressEvent) -> None:
        loss = "" if event.loss is None else f"loss {event.loss:.4f}, "
        speed = f"{loss}{event.images_per_second:,.0f} images/s" if event.step else ""
        context.emit(phase("train", event.step, event.total_steps, speed))

    def measure(model: EmbeddingModel, split: str, step: int) -> dict[str, float]:
        name = context.config.data.test_split if split == "test" else split
        metrics = context.measure(model, context.rows_of(name), f"embed {name}").as_dict()
        key = f"recall_at_{context.config.evaluation.recall_at[0]}"
        text = f"R@{key.rpartition('_')[2]} {metrics[key]:.4f}, MAP@R {metrics['map_at_r']:.4f}"
        context.emit(note(f"step {step:,}: {split} {text}"))
        return metrics

    inputs = projection_inputs(context)
    return TrainHooks(
        checkpoints=folder.checkpoints,
        attempt=attempt,
        batches=_batches(plan, context, inputs),
        class_ids=context.split.class_ids,
        evaluate=measure,
        report=show,
        begin=folder.begin_training,
        projections=inputs,
        name_of_row=context.name_of_row,
    )


def _batches(
    plan: RunPlan, context: RunContext, inputs: ProjectionInputs | None
) -> Callable[[int, int], Iterable[Batch]]:
    """Return the function that loads this rank's batches from a first step to an end step."""
    data = context.config.data
    batches: StatefulPlan | BatchPlan = context.batch_plan()
    if inputs is not None and isinstance(inputs.plan, SystematicPlan):
        batches = StatefulPlan(inputs.plan, inputs.states)

    def load(first: int, end: int) -> Iterable[Batch]:
        if first:
            context.emit(note(f"continuing at step {first:,} of {plan.total_steps:,}"))
        return train_loader(
            context.index,
            batches,
            context.transform,
            seed=context.config.seed,
            topology=context.topology,
            start_step=first,
            end_step=end,
            workers=data.loader_workers,
            prefetch=data.prefetch,
            decoded_cache_mb=data.decoded_cache_mb,
        )

    return load


def _final_results(
    result: TrainResult,
    folder: RunFolder,
    context: RunContext,
    untrained_dir: str | None,
    evaluations: RecordWriter | None,
) -> dict[str, Any]:
    """Evaluate the run as `evaluation.final` sets it; every rank calls it."""
    config = context.config
    chosen = select_checkpoint(folder.checkpoints, "best")
    step = read_manifest(chosen).step
    split = config.data.test_split
    found: dict[str, Any] = {}
    match config.evaluation.final:
        case "full":
            found["trained"] = measure_checkpoint(
                context, chosen, split, keep=folder, per_class=folder.per_class
            )
            found["untrained"] = _measure_untrained(context, untrained_dir, "untrained")
            if has_features_row(config.model):
                found["features"] = _measure_untrained(context, untrained_dir, "features")
        case "metrics":
            found["trained"] = measure_checkpoint(context, chosen, split)
        case "none" if result.best is not None:
            found["validation"] = _recorded_validation(folder, result.best.step, context.comm)
    for name in ("features", "untrained"):
        if evaluations is not None and name in found:
            evaluations.write(0, split=split, protocol=name, **found[name])
    if evaluations is not None and "trained" in found:
        evaluations.write(step, split=split, protocol="final", **found["trained"])
    found["checkpoint"] = {
        "folder": chosen.name,
        "step": step,
        "best": result.best is not None,
    }
    return found


def has_features_row(config: ModelConfig) -> bool:
    """Whether a run is compared with the features that its weights give without a head."""
    return config.head != "none" and getattr(config.backbone, "weights", "none") != "none"


def _measure_untrained(
    context: RunContext, untrained_dir: str | None, kind: Literal["untrained", "features"]
) -> dict[str, Any]:
    """Return the test metrics of the untrained network, measured once for all runs of a study.

    Parallel runs may measure it at the same time; they write the same file.

    Args:
        context: Data and topology.
        untrained_dir: Where the runs of a study share them.
        kind: Embeddings of the network with its head, or the features before the head.
    """
    config, topology = context.config, context.topology
    digest = untrained_digest(config, topology.device_type, kind)
    known = None
    if untrained_dir is not None and topology.is_main:
        known = read_untrained(Path(untrained_dir), digest)
    # Rank 0 decides for all ranks: others may see a new file on a shared disk later.
    known = context.comm.broadcast_object(known, what="metrics of the untrained network")
    if known is not None:
        return dict(known)
    split = config.data.test_split
    model = _untrained(config, topology)
    metrics = context.measure(
        PooledFeatures(model) if kind == "features" else model,
        context.rows_of(split),
        f"embed {split}, {kind}",
        final=True,
    ).as_dict()
    if untrained_dir is not None and topology.is_main:
        write_untrained(Path(untrained_dir), digest, metrics)
    return metrics


def _recorded_validation(folder: RunFolder, step: int, comm: Comm) -> dict[str, Any]:
    """Return the metrics of the validation at a step, which rank 0 reads from the records.

    Raises:
        RunError: If the record is missing.
    """
    found: dict[str, Any] | None = None
    path = folder.records("evaluations")
    if comm.topology.is_main:
        for record in read_records(path):
            if record["step"] == step and record.get("protocol") == "validation":
                found = {key: record[key] for key in record if key not in _NO_METRICS}
    found = comm.broadcast_object(found, what="metrics of the best validation")
    if found is None:
        raise RunError(
            f"{path} has no record of the best validation, at step {step}: restore the file, or "
            "set evaluation.final to metrics, then continue with --resume"
        )
    return found


def _untrained(config: RunConfig, topology: Topology) -> EmbeddingModel:
    """Return the network with its initial weights, the reference for the trained one."""
    dtype = resolve_precision(config.train.precision, topology.device_type).dtype
    model = build_model(config.model, seed=config.seed, dtype=dtype)
    return model.to(topology.device)


# ---------------------------------------------------------------- evaluation


def measure_checkpoint(
    context: RunContext,
    checkpoint: Path,
    split: str,
    *,
    keep: RunFolder | None = None,
    per_class: Path | None = None,
) -> dict[str, float]:
    """Evaluate a checkpoint on a split; every rank calls it.

    Args:
        context: Data and topology.
        checkpoint: The checkpoint's folder.
        split: `validation`, or a split of the index.
        keep: Run folder to write a retrieval gallery, proxy statistics and, if configured, the
            embeddings to, if any.
        per_class: File to write the results per class to, if any.
    """
    config, topology = context.config, context.topology
    dtype = resolve_precision(config.train.precision, topology.device_type).dtype
    model = load_model(checkpoint, config.model, seed=config.seed, dtype=dtype)
    rows = context.rows_of(split)
    result = context.measure(
        model.to(topology.device),
        rows,
        f"embed {split}",
        NUM_NEIGHBORS if keep else 0,
        final=True,
        keep=keep.embeddings if keep and config.evaluation.save_embeddings else None,
    )
    if keep is not None:
        keep_proxy_facts(context, model, checkpoint, keep)
    if keep is not None and topology.is_main:
        gallery = gallery_of(result, rows, context.index, config.seed)
        write_gallery(keep.path, gallery.queries, gallery.classes, exif=context.index.exif)
    if per_class is not None and topology.is_main:
        _write_per_class(per_class, result.per_class, rows, context.index)
    return result.as_dict()


def _write_per_class(path: Path, result: PerClass, rows: np.ndarray, index: Index) -> None:
    """Write the results per class with the names of classes and super-classes."""
    labels, first = np.unique(index.label[rows], return_index=True)
    assert np.array_equal(labels, result.label)
    names = [index.class_names[label] for label in labels]
    super_classes = index.super_class[rows[first]].tolist()
    write_class_table(path, ClassTable(result, names, super_classes))


def _evaluate(assignment: Assignment, context: RunContext) -> dict[str, Any]:
    start = time.monotonic()
    folder = RunFolder(Path(assignment.run_dir))
    chosen = select_checkpoint(folder.checkpoints, assignment.checkpoint)
    _, per_class = folder.evaluation(assignment.split, assignment.checkpoint)
    metrics = measure_checkpoint(context, chosen, assignment.split, per_class=per_class)
    return {
        "trained": metrics,
        "split": assignment.split,
        "checkpoint": {"folder": chosen.name, "step": read_manifest(chosen).step},
        "seconds": {"evaluate": time.monotonic() - start},
    }


# ---------------- alternating projections


def projection_inputs(context: RunContext) -> ProjectionInputs | None:
    """Return the plan and embedding function of alternating projections; None without them."""
    config = context.config
    if config.projections is None:
        return None
    rows = context.split.train_rows
    plan = TrainingRows(rows, context.index.label[rows], config.seed)
    if config.projections.forms_batches:
        batches = config.data.batches
        assert isinstance(batches, BalancedBatchesConfig), "resolving the run plan checks this"
        plan = SystematicPlan(
            rows,
            plan.labels,
            config.seed,
            batches.classes_per_batch,
            batches.samples_per_class,
            holds_representatives=config.projections.form == "batch",
        )

    def embed(model: EmbeddingModel, rows: np.ndarray) -> Tensor:
        found, _, _ = context.embed(model, rows, "embed representatives")
        comm = context.comm
        sizes = comm.gather_objects(len(found), what="numbers of representatives")
        if not len(found):
            found = np.zeros((0, config.model.embedding_size), dtype=np.float32)
        own = torch.from_numpy(found).to(comm.device)
        # Ranks embed contiguous parts, so rank order is row order.
        return comm.all_gather_rows(own, sizes, what="embeddings of representatives")

    return ProjectionInputs(plan, embed)
