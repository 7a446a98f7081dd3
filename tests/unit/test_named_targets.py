"""Which code a configuration names, however it is written."""

from __future__ import annotations

from typing import Any

import pytest

from dml_dist.config.custom import named_targets


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss": {"name": "triplet", "margin": 0.1}}, []),
        ({"loss": {"name": "custom", "target": "a.b:C"}}, ["loss.target: a.b:C"]),
        ({"loss": {"target": "not valid"}}, ["loss.target: not valid"]),
        (
            {"model": {"backbone": {"name": "custom", "target": "os:system"}}, "optim": {"lr": 1}},
            ["model.backbone.target: os:system"],
        ),
        (
            {"compare": {"methods": {"mine": ["loss.name=custom", "loss.target=my:Loss"]}}},
            ["compare.methods.mine: my:Loss"],
        ),
        (
            {"methods": {"mine": ["loss={name: custom, target: 'my.own:Loss'}"]}},
            ["methods.mine: my.own:Loss"],
        ),
        (
            {"tune": {"space": {"loss": {"choices": [{"name": "custom", "target": "x:y"}]}}}},
            ["tune.space.loss.choices.target: x:y"],
        ),
        ({"tune": {"data.transform.target": "x:y"}}, ["tune.data.transform.target: x:y"]),
        ({"compare": {"target_recall": 0.5, "note": "target: none"}}, []),
        (None, []),
    ],
)
def test_every_way_to_name_code_is_found(values: Any, expected: list[str]) -> None:
    assert list(named_targets(values)) == expected
