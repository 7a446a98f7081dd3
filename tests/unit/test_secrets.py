"""A password in a URL stands in config.yaml alone, which only its owner can read."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.cli_data import console
from dml_dist.config.load import differing_paths, dump_config, load_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.data.remote import RemoteFolder
from dml_dist.errors import DmlDistError
from dml_dist.report import write_report
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.tuning import TuningFolder
from dml_dist.runtime.datasets import index_folder, warn_of_secrets

URL = "https://me:passw0rd@host/shards?sig=s3cret"
SECRETS = ("passw0rd", "s3cret")


def config_of(**data: Any) -> RunConfig:
    return parse_config(
        {"name": "small", "data": data, "train": {"global_batch_size": 8, "steps": 1}}
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def hidden(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


def test_a_run_folder_keeps_the_secret_for_its_owner_alone(tmp_path: Path) -> None:
    config = config_of(path=URL)
    run = RunFolder.create(tmp_path / "run", dump_config(config), name="small", seed=0)
    assert load_config(run.config_path) == config
    assert (mode(run.path), mode(run.config_path)) == (0o700, 0o600)
    run.begin_attempt(
        world_size=1,
        launcher="inprocess",
        device="cpu",
        command=f"dml-dist train a.yaml --set 'data.path={URL}'",
        changes=tuple(map(str, differing_paths(config_of(path="/data"), config))),
    )
    run.end("failed", f"no answer from {URL}")
    page = write_report(run.path)
    others = [path for path in run.path.rglob("*") if path.is_file() and path != run.config_path]
    assert page in others
    assert run.info_path in others
    for path in others:
        assert hidden(path.read_bytes().decode(errors="replace")), path
    changes = json.loads(run.info_path.read_text())["attempts"][0]["changes"]
    assert changes == ["data.path: '/data' -> 'https://***@host/shards?***'"]


def test_a_study_keeps_the_secret_for_its_owner_alone(tmp_path: Path) -> None:
    study = TuningFolder(tmp_path / "study")
    study.path.mkdir()
    study.write_config(config_of(path=URL))
    assert (mode(study.path), mode(study.config_path)) == (0o700, 0o600)


def test_other_folders_keep_their_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    run = RunFolder.create(
        tmp_path / "run", dump_config(config_of(path="s3://bucket/a")), name="a", seed=0
    )
    assert (mode(run.path), mode(run.config_path)) == (0o755, 0o644)


def test_there_is_a_warning_with_the_way_out() -> None:
    for data, words in (
        ({"path": URL}, "data.path https://***@host/shards?***"),
        ({"path": "s3://b"}, ""),
    ):
        file = io.StringIO()
        warn_of_secrets(config_of(**data), Console(file=file, width=500))
        assert words in file.getvalue()
        assert ("fsspec" in file.getvalue()) == bool(words)
        assert hidden(file.getvalue())


def test_errors_hide_it() -> None:
    folder = RemoteFolder("https://me:passw0rd@127.0.0.1:1/shards?sig=s3cret", retries=0)
    with pytest.raises(DmlDistError) as caught:
        folder.size("index.parquet")
    assert hidden(str(caught.value))
    with pytest.raises(DmlDistError) as caught:
        index_folder(URL, "train", Console(quiet=True))
    assert hidden(str(caught.value))
    with pytest.raises(DmlDistError) as caught:
        parse_config(
            {"name": "a", "data": {"path": URL, "cache": URL}, "train": {"global_batch_size": URL}}
        )
    assert hidden(str(caught.value))


def test_the_console_of_the_command_line_hides_it(capsys: pytest.CaptureFixture[str]) -> None:
    console.print(f"error at {URL}", soft_wrap=True)
    output = capsys.readouterr().out
    assert output == "error at https://***@host/shards?***\n"
