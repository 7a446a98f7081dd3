"""`data import` of official data sets, its options, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dml_dist.config.data import SOPConfig, SplitConfig, TableConfig
from dml_dist.data.index import read_index
from dml_dist.runtime.datasets import describe
from tests import official_layouts as layouts

Cli = Callable[..., tuple[int, str]]


def test_official_data_in_small(cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layouts.sop(tmp_path / "sop")
    command = ["data", "import", "sop", "--source", "sop", "--out", "shards"]
    code, output = cli(*command)
    assert code == 2
    assert "error: Stanford Online Products in" in output
    assert "--allow-partial" in output
    assert not (tmp_path / "shards").exists()
    command += ["--allow-partial", "--max-side", 20]
    code, output = cli(*command)
    assert code == 0, output
    assert "importing the existing images because allow_partial is set" in caplog.text
    assert "train: 8 images of 3 classes" in output
    assert "test: 5 images of 2 classes" in output
    assert output.strip().splitlines()[-1].startswith("13 images of 5 classes in 2 tar shards")
    assert set(read_index(tmp_path / "shards").width) == {20}
    code, output = cli(*command[:-1], 16)
    assert code == 2
    assert "with other settings" in output


def test_skipped_images_are_reported_each_time(cli: Cli, tmp_path: Path) -> None:
    layouts.inshop(tmp_path / "inshop")
    broken = next((tmp_path / "inshop").rglob("02_1_front.jpg"))
    broken.write_bytes(b"")
    command = ["data", "import", "inshop", "--source", "inshop", "--out", "shards"]
    command += ["--allow-partial"]
    code, output = cli(*command)
    assert code == 2
    assert f"{broken}: the image is empty (0 bytes)" in output
    for _ in range(2):
        code, output = cli(*command, "--on-broken", "skip")
        assert code == 0, output
        assert "skipped 1 broken images, all in shards/skipped.csv, first:" in output
        assert f"{broken}: the image is empty" in output
    code, output = cli(*command)
    assert code == 2
    assert "skipped 1 broken images, listed in skipped.csv" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 3], "--seed 3 has no effect on a split in sorted order"),
        (["--seed", 0, "--order", "sorted"], "give --order seeded too, or leave out --seed"),
        (
            ["--split-file", "s.csv", "--split", "train=0.4"],
            "sets the whole split and cannot be combined with --split;",
        ),
        (
            ["--split-file", "s.csv", "--by", "image", "--order", "seeded", "--seed", 1],
            "--split-file sets the whole split and cannot be combined with --by, --order, --seed",
        ),
        (["--allow-partial"], "this data set has no option allow_partial;"),
        (["--max-side", 5], "max_side: Input should be greater than or equal to 16"),
    ],
)
def test_options_without_effect_are_refused(
    cli: Cli, tmp_path: Path, options: list[object], message: str
) -> None:
    code, output = cli("data", "import", "folder", "--source", ".", "--out", "shards", *options)
    assert code == 2
    assert message in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []


def test_options_that_belong_to_other_data_sets_are_refused(cli: Cli) -> None:
    for name, options, message in (
        ("glyphs", ["--max-side", 64], "has no option max_side, source;"),
        ("glyphs", ["--on-broken", "skip"], "has no option on_broken, source;"),
        ("cub200", ["--seed", 1], "has no option seed;"),
        ("cub200", ["--split", "train=0.5"], "has an official split"),
    ):
        code, output = cli("data", "import", name, "--source", "x", "--out", "shards", *options)
        assert code == 2
        assert message in output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"file": "s.csv", "by": "image"}, "file s.csv defines the split, so it excludes by"),
        ({"file": "s.csv", "order": "seeded", "seed": 1}, "so it excludes order, seed"),
        ({"seed": 4}, "seed 4 is used with order: seeded only, got order: sorted"),
    ],
)
def test_split_settings_without_effect_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitConfig(**values)


def test_description_excludes_paths_and_error_handling() -> None:
    """Source paths and `on_broken` or `allow_partial` do not identify a data set."""
    lenient = SOPConfig(source="a", allow_partial=True, on_broken="skip")
    assert describe(lenient) == describe(SOPConfig(source="b")) == '{"name": "sop"}'
    assert describe(TableConfig(source="b", max_side=64)) == '{"max_side": 64, "name": "table"}'


def test_dry_run_without_data_is_labeled(cli: Cli, tmp_path: Path) -> None:
    config = {
        "name": "dry",
        "data": {"path": "shards", "dataset": {"name": "cub200", "source": "nowhere"}},
        "train": {"global_batch_size": 90, "epochs": 1},
    }
    (tmp_path / "dry.yaml").write_text(yaml.safe_dump(config))
    code, output = cli("train", "dry.yaml", "--dry-run")
    assert code == 0, output
    assert "not imported yet: published totals" in " ".join(output.split())
