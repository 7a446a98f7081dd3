"""Optimiser state by the names of parameters, and in rows for the objective's tables.

torch identifies parameters by index. Names stay valid for another order of groups, and rows for
another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dml_dist.errors import CheckpointError

State = dict[str, Any]
"""Optimiser state of one parameter: tensors and scalars by key."""


def named_states(optimizer: Optimizer) -> dict[str, State]:
    """Return the state of every parameter that has any, by name."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in _named_parameters(optimizer)
        if optimizer.state.get(parameter)
    }


def load_named_states(optimizer: Optimizer, states: Mapping[str, State]) -> None:
    """Replace the optimiser's state; parameters without an entry have none afterwards.

    Learning rates and other settings of groups stay as they are.

    Raises:
        CheckpointError: If a state belongs to no parameter.
    """
    packed = optimizer.state_dict()
    indices = {
        name: index
        for group in packed["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
    }
    unknown = sorted(set(states) - set(indices))
    if unknown:
        raise CheckpointError(
            f"The checkpoint has optimiser state of {unknown[:5]}, which this network does not "
            "have. Use the configuration that the checkpoint was saved with."
        )
    packed["state"] = {indices[name]: state for name, state in states.items()}
    optimizer.load_state_dict(packed)


def split_rows(parameter: Tensor, state: State) -> tuple[dict[str, Tensor], State]:
    """Split the state of a table's rows into state per row and state that all ranks share.

    Raises:
        CheckpointError: If a tensor is neither: such an optimiser cannot be resharded. A vector
            is never per row: its length may equal the number of rows by chance.
    """
    rows, shared = {}, {}
    per_row = (parameter.shape[0], *[1] * (parameter.ndim - 1))
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            shared[key] = value
        elif value.shape in (parameter.shape, per_row):
            rows[key] = value
        else:
            raise CheckpointError(
                f"The optimiser keeps {key!r} of shape {tuple(value.shape)} for this rank's "
                f"proxies, which cannot be split by rows: the shape must be "
                f"{tuple(parameter.shape)} or {per_row}. Use an optimiser with state per element."
            )
    return rows, shared


def join_rows(parts: list[tuple[dict[str, Tensor], State]]) -> State:
    """Return the state of rows that follow each other: the inverse of `split_rows`."""
    rows, shared = parts[0]
    joined = {key: torch.cat([part[0][key] for part in parts]) for key in rows}
    return {**joined, **shared}


@torch.no_grad()
def forget_rows(optimizer: Optimizer, parameter: Parameter, rows: Tensor) -> None:
    """Set the optimiser state of some rows of a table to 0, its initial value.

    Args:
        optimizer: Changed in place.
        parameter: The table's rows of this rank.
        rows: Which of them, (n,) int64.
    """
    if state := optimizer.state.get(parameter):
        for value in split_rows(parameter, state)[0].values():
            value[rows] = 0


@contextmanager
def only_rows(
    optimizer: Optimizer, touched: Iterable[tuple[Parameter, Tensor, Tensor]]
) -> Iterator[None]:
    """Let the optimiser update only some rows of tables within the block.

    The other rows and their state stay as they are. State that is not per row (the number of
    steps) advances for all.

    Args:
        optimizer: Changed in place.
        touched: Of each table the parameter, the rows, (n,) int64, and a leaf with their values
            and gradient, (n, ...).
    """
    places = {
        parameter: (group["params"], place)
        for group in optimizer.param_groups
        for place, parameter in enumerate(group["params"])
    }
    kept = []
    for parameter, rows, values in touched:
        state = optimizer.state.pop(parameter, {})
        of_rows, shared = split_rows(parameter, state)
        if state:
            cut = {key: value[rows] for key, value in of_rows.items()}
            optimizer.state[values] = {**cut, **shared}
        parameters, place = places[parameter]
        parameters[place] = values
        kept.append((parameter, rows, values, of_rows))
    try:
        yield
    finally:
        for parameter, rows, values, of_rows in kept:
            _give_back(optimizer, parameter, rows, values, of_rows)
            parameters, place = places[parameter]
            parameters[place] = parameter


@torch.no_grad()
def _give_back(
    optimizer: Optimizer,
    parameter: Parameter,
    rows: Tensor,
    values: Tensor,
    of_rows: dict[str, Tensor],
) -> None:
    """Write rows and their state back; new state is 0 for the other rows."""
    parameter[rows] = values
    cut, shared = split_rows(values, optimizer.state.pop(values, {}))
    for key, value in cut.items():
        whole = of_rows.setdefault(key, value.new_zeros((len(parameter), *value.shape[1:])))
        whole[rows] = value
    if of_rows or shared:
        optimizer.state[parameter] = {**of_rows, **shared}


def _named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
