"""Errors reported to the user, each with the exit code of the command."""

from __future__ import annotations


class DmlDistError(Exception):
    """Base of all errors that are reported as a message instead of a traceback.

    Every message says what is wrong, what was given, where, and what to do.
    Subclasses take one string, so that they can be pickled between processes.
    """

    exit_code = 1


class ConfigError(DmlDistError):
    """The configuration or the arguments are wrong; nothing was written."""

    exit_code = 2


class DataError(DmlDistError):
    """A data set, a tar shard or an index is invalid."""

    exit_code = 2


class TopologyError(DmlDistError):
    """The number of ranks does not fit the batch, the classes or the machines."""

    exit_code = 2


class CheckpointError(DmlDistError):
    """A checkpoint is missing, damaged or belongs to another configuration."""

    exit_code = 2


class RunError(DmlDistError):
    """A run failed after its start; its last checkpoint, if any, is kept."""

    exit_code = 1


class DivergedError(RunError):
    """Loss, embeddings, gradients or weights are not finite."""


class LoaderLostError(RunError):
    """A loader worker died; the run can resume from a checkpoint."""


class PeerLostError(RunError):
    """A collective failed because another rank died, raised or timed out."""


class RunStopped(DmlDistError):
    """A run was asked to stop and can be continued; its last line says how."""

    exit_code = 1
