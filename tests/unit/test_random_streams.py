"""Random streams: no two names share numbers, and no module creates a stream of its own."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dml_dist
from dml_dist.random_streams import Stream, generator_of, seed_of

ROOT = Path(dml_dist.__file__).parent


def names() -> Iterator[tuple[int, ...]]:
    """Yield seeds with indices: small ones, and those around the size of a word of numpy's."""
    for count in range(4):
        yield from itertools.product(range(3), repeat=1 + count)
    for number in (2**32 - 1, 2**32, 2**32 + 1, 2**64, 2**128, 2**160):
        yield from ((number,), (number, 0), (0, number), (number, 1), (1, number))


def test_different_names_give_different_numbers() -> None:
    """All streams with seeds and indices that numpy's own entropy lists mix up."""
    keys = [(stream, *name) for stream in Stream for name in names()]
    seeds = {seed_of(*key) for key in keys}
    first = {generator_of(*key).integers(2**63) for key in keys}
    assert len(keys) == len(Stream) * (3 + 9 + 27 + 81 + 30)
    assert len(seeds) == len(first) == len(keys)


def test_numpy_alone_mixes_names_up() -> None:
    """Why names are not given to numpy as they are."""
    mixed = ([5], [5, 0]), ([0, 1], [2**32]), ([2**32 + 1], [1, 1])
    for one, other in mixed:
        states = [np.random.SeedSequence(name).generate_state(4).tolist() for name in (one, other)]
        assert states[0] == states[1]


def test_the_same_name_gives_the_same_numbers() -> None:
    one, other = (generator_of(Stream.AUGMENTATION, 7, 3, 5) for _ in range(2))
    assert np.array_equal(one.random(100), other.random(100))
    assert seed_of(Stream.NETWORK, 7, 3) == seed_of(Stream.NETWORK, 7, np.int64(3))


def test_the_meaning_of_a_seed_does_not_change() -> None:
    """Other values of streams or another construction would change the results of every seed."""
    assert [stream.value for stream in Stream] == list(range(1, len(Stream) + 1))
    # The stream, the number of indices, then each integer after the number of its words.
    words = np.random.SeedSequence([Stream.ROW_ORDER, 2, 1, 7, 1, 0, 2, 5, 1])
    expected = np.random.Generator(np.random.Philox(words)).integers(2**63, size=4)
    drawn = generator_of(Stream.ROW_ORDER, 7, 0, 2**32 + 5).integers(2**63, size=4)
    assert np.array_equal(drawn, expected)
    assert seed_of(Stream.MODEL_WEIGHTS, 0) == 13372218284840053770


def test_seeds_have_the_bits_that_libraries_take() -> None:
    wide = [seed_of(Stream.NETWORK, 0, step) for step in range(64)]
    narrow = [seed_of(Stream.HYPERPARAMETERS, seed, bits=32) for seed in range(64)]
    assert 2**63 < max(wide) < 2**64
    assert 2**31 < max(narrow) < 2**32
    assert len(set(narrow)) == 64


@pytest.mark.parametrize("name", [(-1,), (0, -1), (0, 3, -2)])
def test_negative_names_are_refused(name: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"SPLIT.*at least 0"):
        generator_of(Stream.SPLIT, *name)


# ---------------- no streams elsewhere

NUMPY_TYPES = {"Generator", "BitGenerator"}
BANNED = {"SeedSequence", "Philox", "PCG64", "MT19937", "SFC64", "RandomState", "default_rng"}


def streams_made(source: str) -> list[str]:
    """Return where a module makes a stream or gives a library a seed that is not `seed_of(...)`."""
    tree = ast.parse(source)
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    named = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and _is_seed(node.value, set())
    }
    found = []
    for node in ast.walk(tree):
        if _makes_stream(node, named, parent):
            found.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return found


def _is_seed(value: ast.expr, named: set[str]) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) == "seed_of"
    return isinstance(value, ast.Name) and value.id in named


def _makes_stream(node: ast.AST, named: set[str], parent: dict[ast.AST, ast.AST]) -> bool:
    match node:
        case ast.Import(names=aliases):
            return any(alias.name in ("random", "numpy.random") for alias in aliases)
        case ast.ImportFrom(module=module):
            return module in ("random", "numpy.random")
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in BANNED:
            return True
        # The global generator of numpy, and constructors of its types.
        case ast.Attribute(value=ast.Attribute(attr="random", value=ast.Name(id="np"))):
            called = isinstance(parent[node], ast.Call) and parent[node].func is node  # type: ignore[attr-defined]
            return called or node.attr not in NUMPY_TYPES
        case ast.Call(func=ast.Attribute(attr="manual_seed" | "manual_seed_all"), args=args):
            return len(args) != 1 or not _is_seed(args[0], named)
        case ast.Call(func=ast.Attribute(attr="Generator", value=ast.Name(id="torch"))):
            after = parent[node]
            return not (isinstance(after, ast.Attribute) and after.attr == "manual_seed")
        case ast.Call(keywords=keywords, func=function):
            seeds = {"random_state"} | ({"seed"} if "Sampler" in ast.unparse(function) else set())
            return any(word.arg in seeds and not _is_seed(word.value, named) for word in keywords)
    return False


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.stem)
def test_streams_are_made_in_one_module(path: Path) -> None:
    if path.name != "random_streams.py":
        assert streams_made(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import random", 1),
        ("from random import Random", 1),
        ("from numpy.random import default_rng", 1),
        ("np.random.default_rng(seed)", 1),
        ("np.random.SeedSequence([seed, 1])", 1),
        ("np.random.Generator(bits)", 1),
        ("np.random.permutation(5)", 1),
        ("np.random.seed(5)", 1),
        ("def draw(generator: np.random.Generator) -> int: ...", 0),
        ("generator_of(Stream.SPLIT, seed).permutation(5)", 0),
        ("torch.manual_seed(seed)", 1),
        ("torch.cuda.manual_seed(step + 1)", 1),
        ("torch.default_generator.manual_seed(seed_of(Stream.NETWORK, seed))", 0),
        ("seed = seed_of(Stream.NETWORK, seed)\ntorch.cuda.manual_seed(seed)", 0),
        ("torch.Generator()", 1),
        ("torch.Generator().manual_seed(seed)", 1),
        ("torch.Generator(device).manual_seed(seed_of(Stream.NETWORK, seed))", 0),
        ("def draw(generator: torch.Generator) -> int: ...", 0),
        ("UMAP(random_state=seed)", 1),
        ("optuna.samplers.TPESampler(seed=seed)", 1),
        ("TPESampler(seed=seed_of(Stream.HYPERPARAMETERS, seed, bits=32))", 0),
        ("build_model(config, seed=seed)", 0),
    ],
)
def test_streams_made_elsewhere_are_seen(source: str, count: int) -> None:
    assert bool(streams_made(source)) == bool(count)
