"""Every shipped configuration: a claim, a command, and a plan without its data."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import dml_dist.orchestration
from dml_dist.cli import app
from dml_dist.config.data import GlyphsConfig
from dml_dist.config.load import load_config
from dml_dist.config.schema import NoValidationConfig, RunConfig
from dml_dist.errors import ConfigError
from dml_dist.orchestration.train import dry_run_table
from dml_dist.report.study.references import find_published, read_references
from dml_dist.runs.comparison import method_config
from dml_dist.runtime.estimate import estimate_plan
from dml_dist.studies.compare import dry_run_comparison
from dml_dist.studies.scale.study import dry_run_scaling
from dml_dist.studies.tune_check import dry_run_tuning

ROOT = Path(__file__).parents[2]
REFERENCES = ROOT / "configs/references.yaml"
CONFIGS = [
    *sorted(path for path in (ROOT / "configs").glob("*.yaml") if path != REFERENCES),
    Path(dml_dist.orchestration.__file__).parent / "quickstart.yaml",
]
# Training images and classes, as published (PEERS) or counted once.
TRAINING = {
    "cub200": (5_864, 100),
    "cars196": (8_054, 98),
    "sop": (59_551, 11_318),
    "sop_shape": (59_551, 11_318),
    "inshop": (25_882, 3_997),
    "omniglot": (2_420, 121),
    "tiny_imagenet": (2_500, 25),
    "cars_crops": (4_052, 98),
}
DATASETS = ("cub200", "cars196", "sop", "inshop")
RECIPES = ("proxy_nca", "proxy_nca_pp", "proxy_anchor", "proxy_anchor_nir", "projections")
RECIPES += ("projections_table",)


def head(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return "\n".join(line for line in lines[: lines.index(f"name: {path.stem}")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_a_runnable_claim(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = head(path)
    assert all(line.startswith("#") for line in text.splitlines())
    assert text.startswith("# Claim: ")
    commands = re.findall(r"dml-dist (\S+)(?: (configs/\S+))?", text[text.index("# Run:") :])
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {"data"}
    assert {name for name, _ in commands} <= known
    named = [Path(file) for _, file in commands if file]
    assert named == ([Path("configs") / path.name] if path.parent.name == "configs" else [])

    monkeypatch.chdir(tmp_path)  # where there is no data
    config = load_config(path)
    if config.model.backbone.name == "timm":
        pytest.importorskip("timm", reason="the extra `timm` is not installed")
        package = config.model.backbone.weights.removeprefix("package:")
        if find_spec(package.replace("-", "_")) is None:
            pytest.skip(f"the package {package}, which holds the weights, is not installed")
    assert config.name == path.stem
    if path.stem != "quickstart":  # glyphs are drawn; the others have no data here
        dry_run_table(config, Console(quiet=True))
    plan, origin = estimate_plan(config, 2 if config.launch.launcher == "ray" else 1)
    if isinstance(config.data.dataset, GlyphsConfig):
        classes = config.data.dataset.num_classes // 2
        images = classes * config.data.dataset.images_per_class
    else:
        images, classes = TRAINING[Path(config.data.path).name]
    assert plan.num_classes + plan.num_validation_classes == classes
    assert plan.num_images + plan.num_validation_images == images
    kind = getattr(config.data.dataset, "name", "")
    words = dict.fromkeys(("glyphs", "sop_shape"), "as the data set lists them")
    words |= dict.fromkeys(("folder", "table"), "data.dataset.expected")
    assert words.get(kind, "published totals, class sizes estimated") in origin
    if config.compare is not None:
        assert "dml-dist compare" in text
        dry_run_comparison(config, Console(quiet=True))
    if config.tune is not None:
        assert "dml-dist tune" in text
        claim = " ".join(text.replace("#", " ").split())
        assert "Not measured." in claim or re.search(r"commit [0-9a-f]{7}", claim)
        dry_run_tuning(config, Console(quiet=True))
    if config.scale is not None:
        assert "dml-dist scale" in text
        dry_run_scaling(config, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_recipe_of_every_data_set(dataset: str) -> None:
    for recipe in RECIPES:
        path = ROOT / "configs" / f"{recipe}_{dataset}.yaml"
        assert "Not measured by us." in " ".join(head(path).replace("#", " ").split())
        config = load_config(path)
        assert getattr(config.data.dataset, "name", "") == dataset
        backbone = "googlenet" if recipe == "proxy_nca" else "resnet50"
        assert (config.model.backbone.name, config.nir is not None) == (
            backbone,
            recipe == "proxy_anchor_nir",
        )
        if recipe == "projections":
            compare_losses_with_and_without(config, "batch", "margin")
        if recipe == "projections_table":
            compare_losses_with_and_without(config, "table", "multi_similarity")


def compare_losses_with_and_without(config: RunConfig, form: str, third: str) -> None:
    for loss in ("contrastive", "triplet", third):
        base, projected = (method_config(config, loss + end) for end in ("", "_projections"))
        assert base.loss.name == loss
        assert base.loss == projected.loss
        assert base.projections is None
        assert projected.projections is not None
        assert projected.projections.form == form
        assert projected.projections.proximal_weight == 2e-4


def test_searches_keep_the_recipe_and_watch_no_test_class() -> None:
    recipes = {
        "tune_cub200": "proxy_anchor_nir_cub200",
        "tune_cars196": "proxy_nca_pp_cars196",
        "tune_sop": "proxy_anchor_nir_sop",
    }
    searched: set[str] = set()
    for path in (ROOT / "configs").glob("tune_*.yaml"):
        config = load_config(path)
        assert config.tune is not None
        assert config.evaluation.evaluate_test_every is None
        searched |= set(config.tune.space)
        if path.stem in recipes:
            own = load_config(ROOT / f"configs/{recipes[path.stem]}.yaml")
            assert (config.data, config.model) == (own.data, own.model)
            assert (config.loss, config.optim) == (own.loss, own.optim)
            assert config.proxies == own.proxies
            assert config.train.global_batch_size == own.train.global_batch_size
    assert searched >= {
        *("loss.margin", "loss.scale", "loss.embedding_scale", "optim.lr"),
        *("optim.proxy_lr", "optim.loss_lr", "nir.flow_weight", "nir.loss_weight"),
        *("projections.proximal_weight", "schedule.warmup_steps", "train.backbone_warmup_epochs"),
    }


def test_claims_quote_the_published_rows() -> None:
    """Numbers in claims of recipes are in references.yaml for the same method and data set."""
    rows = read_references(REFERENCES).rows
    for recipe in RECIPES[:4]:
        for dataset in DATASETS:
            text = head(ROOT / "configs" / f"{recipe}_{dataset}.yaml")
            known = {
                row.recall["1"]
                for row in rows
                if (row.method, row.dataset) == (recipe, dataset) and "mlrc" not in row.protocol
            }
            claim = " ".join(text[: text.index("Not measured")].replace("#", " ").split())
            published = claim.partition("Published: ")[2]
            quoted = {float(found) for found in re.findall(r"\d\d\.\d+", published)}
            assert quoted == known, (recipe, dataset)


def test_references_have_their_form(tmp_path: Path) -> None:
    table = read_references(REFERENCES)
    assert len(table.rows) > 40
    assert {row.protocol for row in table.rows} == set(table.protocols)
    assert {row.dataset for row in table.rows} == set(DATASETS)
    keys = [
        (row.method, row.dataset, row.backbone, row.embedding_size, row.protocol)
        for row in table.rows
    ]
    assert len(set(keys)) == len(keys)
    for row in table.rows:  # what is quoted by others says by whom
        assert row.verified != any(word in row.source for word in ("quoted", "quoting"))
        recalls = [row.recall[k] for k in sorted(row.recall, key=int)]
        assert recalls == sorted(recalls)

    plain = yaml.safe_load(REFERENCES.read_text())
    path = tmp_path / "r.yaml"
    for change in ({"protocol": "best"}, {"recall": {"1": 101.0}}, {"verified": None}, {"x": 1}):
        path.write_text(yaml.safe_dump({**plain, "rows": [plain["rows"][0] | change]}))
        with pytest.raises(ConfigError, match=next(iter(change))):
            read_references(path)
    path.write_text(yaml.safe_dump({**plain, "protocols": {}}))
    with pytest.raises(ConfigError, match=r"without a description .*best_on_test"):
        read_references(path)


def test_rows_of_the_own_protocol_alone() -> None:
    """Same data set, network, embedding size and protocol; everything else is another matter."""
    own = load_config(ROOT / "configs/proxy_anchor_cub200.yaml")
    assert isinstance(own.validation, NoValidationConfig)
    found = find_published(own, REFERENCES)
    assert [(row.method, row.recall["1"]) for row in found.rows] == [("proxy_anchor", 69.9)]
    assert [name for name, _ in found.protocols] == ["best_on_test"]
    assert "not shown: they have another network" in found.reason

    for changes in (
        ["evaluation.evaluate_test_every=null"],  # no curve on test classes, no best of it
        ["model.embedding_size=128"],
        ["model.backbone.name=resnet101", "model.backbone.weights=IMAGENET1K_V1"],
        ["validation={name: fraction}"],
        ["data.dataset.allow_partial=true"],
        ["data.dataset={name: sop, source: x}"],
    ):
        config = load_config(ROOT / "configs/proxy_anchor_cub200.yaml", changes)
        assert find_published(config, REFERENCES).rows == (), changes
    plus = load_config(ROOT / "configs/proxy_nca_pp_sop.yaml")
    assert [row.recall["1"] for row in find_published(plus, REFERENCES).rows] == [81.4]
    glyphs = load_config(ROOT / "configs/compare_glyphs.yaml")
    assert "no published results" in find_published(glyphs, REFERENCES).reason
