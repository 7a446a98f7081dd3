"""The errors that a user can meet, each with the exit code of the command that ends with it."""

from __future__ import annotations


class DmlDistError(Exception):
    """Base of all errors that are reported as a message and not as a traceback.

    Every message has four parts: what was required, what was given, where, and what to do.
    Subclasses take one string, so that they survive pickling between processes unchanged.
    """

    exit_code = 1


class ConfigError(DmlDistError):
    """The configuration or the arguments are wrong; nothing was written."""

    exit_code = 2


class DataError(DmlDistError):
    """A data set, a tar shard or an index is not what it should be."""

    exit_code = 2


class TopologyError(DmlDistError):
    """The number of ranks does not fit the batch, the classes or the machines."""

    exit_code = 2


class CheckpointError(DmlDistError):
    """A checkpoint is missing, damaged or belongs to another configuration."""

    exit_code = 2


class RunError(DmlDistError):
    """A run failed after it had started; its last checkpoint is kept."""

    exit_code = 1


class LoaderLostError(RunError):
    """A loader worker died; the rank that it worked for can go on from a checkpoint."""


class PeerLostError(RunError):
    """A collective ended without the other ranks: one of them died, gave up or is too late."""


class RunStopped(DmlDistError):
    """A run was asked to stop and can be continued; its last line says how."""

    exit_code = 1
