"""The worked examples of docs/methods.md: FLOPs and bytes by hand, from the numbers in the
configuration of Llama-3.1-8B."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from examples import blocks

import simulator
from simulator.pruning.described.description import (
    EVERY,
    KERNELS,
    OPERATORS,
    PLACES,
    ROLES,
    Addition,
    Change,
    Description,
)
from simulator.pruning.described.expressions import NAMES
from simulator.workload import Workload

PAGE = Path(__file__).parents[3] / "docs" / "methods.md"
EXAMPLES = PAGE.with_suffix("")

# config.json of Llama-3.1-8B; weights, activations and cache in 2 bytes
HIDDEN, INNER, HEADS, KV_HEADS, DIM, LAYERS = 4096, 14336, 32, 8, 128, 32
MLP = 3 * HIDDEN * INNER  # weights of a block
ATTENTION = HIDDEN * (HEADS + 2 * KV_HEADS) * DIM + HEADS * DIM * HIDDEN


def pair(name: str, s: float, **request: object) -> tuple[Workload, Workload]:
    """Return the dense workload, and that of an example."""
    dense = simulator.lower("llama-3.1-8b", **request)
    return dense, simulator.Method.read(EXAMPLES / f"{name}.yaml").prune(dense, s)


def removed(dense: Workload, pruned: Workload, column: str, *roles: str) -> float:
    """Return the FLOPs or bytes that roles lose."""
    of_dense, of_pruned = (
        float(getattr(w, column)[w.is_role(*roles) & ~w.overhead].sum()) for w in (dense, pruned)
    )
    return of_dense - of_pruned


def added(pruned: Workload, column: str, role: str) -> float:
    return float(getattr(pruned, column)[pruned.is_role(role) & pruned.overhead].sum())


def test_a_router_that_skips_mlp_blocks() -> None:
    """26 of 32 layers (4 to 29); 1,024 of 2,048 tokens skip their MLP."""
    dense, pruned = pair("router-mlp", 0.5, phase="prefill", seq=2048)
    assert removed(dense, pruned, "flops", "gate_up", "down") == 26 * 1024 * 2 * MLP
    assert removed(dense, pruned, "flops", "qkv", "o", "attention", "lm_head") == 0
    assert added(pruned, "flops", "router") == 26 * 2048 * 2 * HIDDEN
    # inputs, weights and results of the router
    assert added(pruned, "bytes", "router") == 26 * 2 * (2048 * HIDDEN + HIDDEN + 2048)
    assert added(pruned, "bytes", "select") == 26 * (4 * 2048 + 4 * 1024)
    row = 2 * 2 * HIDDEN + 4  # read and written, and the index of the token
    for role in ("gather", "scatter"):
        assert added(pruned, "bytes", role) == 26 * 1024 * row
    assert set(pruned.m[pruned.is_role("gate_up")].tolist()) == {1024, 2048}


def test_a_token_alone_skips_with_a_probability() -> None:
    """A decode step of one token reads the MLP's weights with a probability of 0.5."""
    dense, pruned = pair("router-mlp", 0.5, phase="decode", seq=2048)
    weights = 26 * 0.5 * 2 * MLP
    activations = 26 * 0.5 * 2 * (HIDDEN + 2 * INNER + INNER + HIDDEN)
    assert removed(dense, pruned, "bytes", "gate_up", "down") == weights + activations


def test_tokens_that_leave_half_way() -> None:
    """From layer 16 on, 1,024 of 2,048 tokens are left, and their queries see only each other."""
    dense, pruned = pair("half-way", 0.5, phase="prefill", seq=2048)
    products = removed(dense, pruned, "flops", "qkv", "o", "gate_up", "down")
    assert products == 16 * 1024 * 2 * (ATTENTION + MLP)
    pairs = 2048 * 2049 // 2 - 1024 * 1025 // 2
    assert removed(dense, pruned, "flops", "attention") == 16 * pairs * 4 * HEADS * DIM
    assert added(pruned, "bytes", "select") == 4 * 2048 * HEADS + 4 * 1024
    assert added(pruned, "bytes", "gather") == 2 * 1024 * HIDDEN * 2
    position = 2 * KV_HEADS * DIM * 2  # bytes of a key and a value in a layer
    cache = [simulator.memory(w, "h100").cache_bytes for w in (dense, pruned)]
    assert cache[0] - cache[1] == 16 * 1024 * position


def test_low_rank_keys() -> None:
    """8 sequences of 32,768 positions and a new one: 16 of 128 dimensions of each key are read,
    then a quarter of the positions."""
    dense, pruned = pair("low-rank-keys", 0.75, phase="decode", batch=8, seq=32768)
    keys = 8 * 32769
    position = 2 * KV_HEADS * DIM * 2
    gone = removed(dense, pruned, "bytes", "attention")
    assert gone == pytest.approx(LAYERS * 0.75 * keys * position, rel=1e-4)
    flops = LAYERS * 0.75 * keys * 4 * HEADS * DIM
    assert removed(dense, pruned, "flops", "attention") == pytest.approx(flops)
    assert added(pruned, "flops", "router") == LAYERS * 8 * (HEADS + KV_HEADS) * 2 * 16 * DIM
    low_rank, scores = keys * KV_HEADS * 16 * 2, keys * HEADS * 4
    assert added(pruned, "bytes", "mask") == LAYERS * (low_rank + scores)
    assert added(pruned, "bytes", "select") == LAYERS * 1.25 * scores


def test_the_page_explains_the_language() -> None:
    """Each key, name, operator, axis, kernel and role of a method file is on the page, as code."""
    spans = re.findall(r"`([^`\n]+)`", PAGE.read_text())
    explained = set(re.findall(r"[\w:-]*\w", " ".join(spans).replace(": ", " ")))
    keys = {f.name for one in (Description, Change, Addition) for f in fields(one)}
    keys -= {"name", "operator", "axis", "stays", "kernel", "kind", "sizes"}
    axes = {axis for axes in OPERATORS.values() for axis in axes}
    words = {*keys, *NAMES, *OPERATORS, *axes, *KERNELS, *ROLES, *PLACES, *EVERY}
    assert not words - explained


def test_the_page_shows_one_of_these_files_and_names_the_others() -> None:
    shown = {block.file: block.text for block in blocks(PAGE) if block.file}
    assert shown == {name: (EXAMPLES / name).read_text() for name in ("router-mlp.yaml",)}
    assert all(f"(methods/{path.name})" in PAGE.read_text() for path in EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("router-mlp", "--phase prefill"),
        ("half-way", "--phase prefill"),
        ("low-rank-keys", "--phase decode --batch 8 --seq 32768"),
    ],
)
def test_the_examples_have_no_warning(name: str, options: str, cli: object) -> None:
    shown = cli.out(f"methods check {EXAMPLES / name}.yaml {options}")  # type: ignore[attr-defined]
    assert shown.splitlines()[-1] == "no warning"
