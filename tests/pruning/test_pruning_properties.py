"""Properties of every family at any shape and sparsity, and compositions of families."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tiny_decoder import DECODERS, FUSED, GQA, MHA, Decoder, projections, workload

from simulator.codes import PHASES, Kernel
from simulator.errors import InputError
from simulator.pruning import FAMILIES, general_families, prune
from simulator.workload import Workload

pytestmark = pytest.mark.quick


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    groups, repeat = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    gated, bias = draw(st.booleans()), draw(st.booleans())
    hidden, layers, head_dim = (
        8 * draw(st.integers(2, 30)),
        draw(st.integers(1, 9)),
        8 * draw(st.integers(1, 4)),
    )
    widths = hidden, layers, groups * repeat, groups, head_dim, draw(st.integers(8, 300))
    return Decoder(*widths, gated=gated, bias=bias, fused=gated and draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Workload, str, float]:
    batch, seq, steps = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 4))
    w = workload(draw(decoders()), draw(st.sampled_from(PHASES)), batch, seq, steps)
    family = draw(st.sampled_from(general_families()))
    return w, family, 0.5 if family == "semi_structured" else draw(st.floats(0.0, 0.99))


def check(w: Workload) -> None:
    for name in Workload.SCHEMA:
        column = getattr(w, name)
        assert np.isfinite(column).all(), name
        assert (column >= (-1 if name == "layer" else 0)).all(), name
    assert ((w.density > 0) & (w.density <= 1 + 1e-12)).all()
    gemm = w.kind == 0
    assert (np.stack([w.m, w.n, w.k])[:, gemm] >= 1).all()
    attention = (w.kind == 1) | (w.kind == 2)
    assert (np.stack([w.batch, w.q_len, w.kv_len, w.heads, w.kv_heads])[:, attention] >= 1).all()
    assert (w.heads[attention] % w.kv_heads[attention] == 0).all()
    assert (w.q_len <= w.kv_len)[attention].all()
    assert (w.layers[w.layer < 0] == 0).all()


@settings(max_examples=400, deadline=None)
@given(cases())
def test_columns_stay_valid_and_work_never_grows(case: tuple[Workload, str, float]) -> None:
    w, family, s = case
    kernels = FAMILIES[family].dynamic and "kernel" in FAMILIES[family].options
    check(prune(w, family, s))
    # rows of other kernels are not equal to rows of dense kernels
    full, bound = (
        prune(w, family, s, **{"kernel": "gathered"} if kernels else {}),
        prune(w, family, s, ideal=True),
    )
    check(full)
    check(bound)
    assert not bound.overhead.any()
    own = full.take(~full.overhead)
    assert own == bound
    if family != "low_rank":  # a rank rounded up to 16 may cost more than a small weight
        assert bound.flops.sum() <= w.flops.sum() * (1 + 1e-12)
        assert bound.parameters <= w.parameters * (1 + 1e-12)
    if family in ("dynamic_depth", "dynamic_width", "sparse_attention", "token", "kv_cache"):
        assert bound.parameters == pytest.approx(w.parameters, rel=1e-12)
    applied = full.meta.applied[-1]
    assert applied == bound.meta.applied[-1]
    assert applied.sparsity == s
    assert 0 <= applied.realised <= 1
    if family in (
        "unstructured",
        "semi_structured",
        "dynamic_depth",
        "dynamic_width",
        "sparse_attention",
    ):
        assert applied.realised == pytest.approx(s, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(cases(), st.floats(0.0, 0.9))
def test_a_higher_sparsity_never_costs_more_flops(
    case: tuple[Workload, str, float], share: float
) -> None:
    w, family, s = case
    if family != "semi_structured":
        a, b = (prune(w, family, x, ideal=True).flops.sum() for x in (s * share, s))
        # sparsity 0 is dense, the smallest other a pair of full rank
        if family != "low_rank" or s * share > 0:
            assert b <= a * (1 + 1e-12)


def totals(w: Workload) -> tuple[float, float, float]:
    kept = ~w.overhead
    return (
        float(w.flops[kept].sum()),
        float((w.params * w.count)[kept].sum()),
        float(w.bytes[kept].sum()),
    )


COMMUTE = {
    "depth": (
        "width",
        "width_cross",
        "semi_structured",
        "low_rank",
        "kv_cache",
        "dynamic_depth",
        "dynamic_width",
    ),
    "width": (
        "width_cross",
        "semi_structured",
        "unstructured",
        "dynamic_depth",
        "kv_cache",
        "token",
    ),
    "width_cross": ("dynamic_depth",),
    "semi_structured": ("dynamic_depth", "token"),
    "sparse_attention": ("kv_cache", "dynamic_depth"),
    "unstructured": ("kv_cache",),
}


@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a, others in COMMUTE.items() for b in others]
)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", DECODERS)
def test_independent_families_commute(first: str, second: str, phase: str, name: str) -> None:
    d = DECODERS[name]
    w = workload(d, phase, 3)
    a = prune(prune(w, first, 0.5), second, 0.5)
    b = prune(prune(w, second, 0.5), first, 0.5)
    flops, parameters, moved = totals(a)
    assert (flops, moved) == pytest.approx(totals(b)[::2], rel=1e-12)
    # rows of a sublayer that a batch can skip carry more than their weights, and a bias then counts
    # as weights
    biases = (
        d.bias * d.layers * sum(n for n, _ in projections(d).values())
        if "dynamic_depth" in (first, second)
        else 0
    )
    assert parameters == pytest.approx(totals(b)[1], rel=1e-12, abs=biases)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([GQA, MHA, FUSED]),
    st.sampled_from(PHASES),
    st.integers(1, 30),
    st.lists(st.sampled_from(list(FAMILIES)), min_size=2, max_size=4),
)
def test_any_composition_is_valid_or_refused(
    d: Decoder, phase: str, batch: int, families: list[str]
) -> None:
    w = workload(d, phase, batch)
    applied = []
    for family in families:
        try:
            w = prune(w, family, 0.5)
        except InputError as error:
            event(str(error))
            continue
        applied.append(family)
        check(w)
        assert [a.family for a in w.meta.applied] == applied


def test_compositions_multiply() -> None:
    w = workload(GQA, "decode", 4)
    both = prune(prune(w, "width", 0.5), "semi_structured", 0.5)
    rows = both.is_role("up")
    assert (both.n[rows][0], both.density[rows][0], both.params[rows][0]) == (96, 0.5, 96 * 64 / 2)
    pair = prune(prune(w, "low_rank", 0.5), "width", 0.5)
    at = np.flatnonzero(pair.is_role("up"))
    assert list(zip(pair.n[at], pair.k[at])) == [(32, 64), (96, 32)]  # rank 23 -> 32
    at = np.flatnonzero(pair.is_role("down"))
    assert list(zip(pair.n[at], pair.k[at])) == [(32, 96), (64, 32)]
    sparse = prune(prune(w, "low_rank", 0.5), "semi_structured", 0.5)
    assert (sparse.kernel[sparse.stage > 0] == Kernel.SPARSE24).all()
    # 3 of 6 layers have attention, all an MLP
    few = prune(prune(workload(GQA), "depth", 0.5, unit="attention"), "token", 0.5)
    for role, tokens in (("q", {96: 2, 48: 1}), ("up", {96: 2, 48: 4})):
        rows = few.is_role(role)
        assert {m: few.count[rows & (few.m == m)].sum() for m in set(few.m[rows])} == tokens
    cache = prune(prune(w, "token", 0.5), "kv_cache", 0.5)
    assert cache.kv_len[cache.is_role("attention")].tolist() == [25, 13]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("semi_structured", "low_rank", "apply low_rank first"),
        ("low_rank", "low_rank", "got low-rank ones"),
        ("semi_structured", "unstructured", "got sparse ones \\(sparse24\\)"),
        ("unstructured", "semi_structured", "got sparse ones \\(unstructured\\)"),
        ("dynamic_depth", "dynamic_depth", "tokens are routed already"),
        ("semi_structured", "dynamic_width", "no kernel skips both zeros and tiles"),
    ],
)
def test_impossible_compositions_are_refused(first: str, second: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(prune(workload(FUSED), first, 0.5), second, 0.5)
