"""The start of an attempt: what run.json says of it, and room for the fewest ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dml_dist.config.schema import RunConfig
from dml_dist.errors import TopologyError
from dml_dist.parallel.comm import Comm
from dml_dist.runtime import attempts
from dml_dist.runtime.attempts import bytes_of_proxies
from dml_dist.topology import Topology
from dml_dist.train.run_plan import RunPlan
from tests.training_setup import NUM_CLASSES, small_config, small_plan

# With Adam each element is four numbers: itself, its gradient, and two of the optimiser.
BYTES = NUM_CLASSES * 6 * 4 * 4


def elastic(**changes: Any) -> tuple[RunConfig, RunPlan]:
    config = small_config(launch__launcher="ray", launch__num_workers="{min: 1, max: 3}", **changes)
    return config, small_plan(config, 3)


def test_bytes_of_proxies_on_other_numbers_of_ranks() -> None:
    config, plan = elastic()
    assert [bytes_of_proxies(plan, config, size) for size in (1, 2)] == [BYTES, BYTES // 2]
    config, plan = elastic(optim="{name: sgd, momentum: 0.0}")
    assert bytes_of_proxies(plan, config, 1) == BYTES // 2
    custom = "{name: custom, target: 'torch.optim:Adam'}"
    config, plan = elastic(optim=custom)
    assert bytes_of_proxies(plan, config, 1) == BYTES // 2  # The state is unknown.
    config, plan = elastic(train__precision="float64")
    assert bytes_of_proxies(plan, config, 1) == 2 * BYTES


@pytest.mark.parametrize(("limit", "fits"), [(BYTES, True), (BYTES - 1, False)])
def test_the_fewest_ranks_must_hold_all_proxies(
    limit: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_memory_of_a_rank", lambda topology: limit)
    config, plan = elastic()
    context: Any = SimpleNamespace(
        config=config, topology=Topology(world_size=3, node="n1"), comm=Comm.single()
    )
    if fits:
        attempts._check_fewest(plan, context)
        return
    with pytest.raises(TopologyError, match=r"launch\.min_workers is 1: .* node n1 .* least 2"):
        attempts._check_fewest(plan, context)
    # A fixed number of ranks is checked by nobody: it either runs or does not.
    context.config = small_config(launch__launcher="ray", launch__num_workers=3)
    attempts._check_fewest(plan, context)


def test_the_memory_of_a_rank_is_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = attempts._memory_of_a_rank(Topology(world_size=3))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert attempts._memory_of_a_rank(Topology(world_size=3)) == alone // 2
    assert 2**30 < alone < 2**50
