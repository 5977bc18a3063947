"""Pruned workloads: FLOPs and parameters counted from shapes in plain Python; bytes, unchanged
rows, added rows."""

from __future__ import annotations

import numpy as np
import pytest
from shaped import resized
from tiny_decoder import DECODERS, GQA, MHA, Decoder, expected, workload

from simulator.codes import PHASES, ROLES, Kernel, Kind
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.pruning import general_families, prune
from simulator.pruning._methods import METHODS
from simulator.workload import Workload

SPARSITIES = (0.1, 0.5, 0.7)
SHAPES = {**DECODERS, "llama-3.1-8b": Decoder(4096, 32, 32, 8, 128, 14336, 128256)}


def counts(w: Workload) -> tuple[float, float]:
    own = ~w.overhead
    return float(w.flops[own].sum()), float((w.params * w.count)[own].sum())


OPTIONS = [
    *((family, {}) for family in general_families()),
    *(
        ("dynamic_depth", {"prune_kv": p, "kernel": k})
        for p in (True, False)
        for k in ("reference", "gathered")
    ),
    *(("dynamic_depth", {"unit": "layer", "kernel": k}) for k in ("reference", "gathered")),
    *(("dynamic_width", {"kernel": kernel}) for kernel in ("gathered", "looped")),
    ("unstructured", {"kernel": "spmv"}),
    *(("width", {"align": align}) for align in (1, 8)),
    ("token", {"start": 0}),
    ("token", {"start": 4, "mode": "static"}),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SHAPES)
def test_flops_and_parameters(
    family: str, options: dict[str, object], phase: str, name: str
) -> None:
    d = SHAPES[name]
    for s in SPARSITIES if family != "semi_structured" else (0.5,):
        for batch in (1, 3, 40, 600):
            dense = workload(d, phase, batch)
            want = pytest.approx(expected(d, phase, batch, 48, 3, family, s, **options), rel=1e-12)
            assert counts(prune(dense, family, s, ideal=True, **options)) == want, (s, batch)
            assert counts(prune(dense, family, s, **options)) == want, (s, batch)


@pytest.mark.quick
def test_overhead_flops_are_those_of_router_and_projection() -> None:
    d = DECODERS["gqa"]
    for phase, tokens in (("prefill", 96), ("decode", 2)):
        dense = workload(d, phase, 2)
        for family, options, extra in (
            ("dynamic_depth", {}, 2 * 2 * tokens * 2 * 64),
            ("dynamic_depth", {"router": 1}, 2 * 2 * tokens * 64),
            ("dynamic_width", {"channel_groups": 11}, 2 * tokens * (4 + 11) * 64),
            ("width_cross", {"residual_projections": True}, 2 * 2 * tokens * 48 * 48),
        ):
            full, bound = (
                prune(dense, family, 0.25, ideal=ideal, **options) for ideal in (False, True)
            )
            assert full.flops.sum() - bound.flops.sum() == pytest.approx(6 * extra)
            assert not bound.overhead.any()
            assert full.parameters - bound.parameters == pytest.approx(6 * extra / 2 / tokens)
            assert np.isclose(full.flops[full.overhead].sum(), 6 * extra)


@pytest.mark.quick
def test_devices_share_the_pruned_model() -> None:
    model = load_model("llama-3.1-8b")
    dense = lower(model, phase="decode", batch=4, seq=512, devices=2, engine="")
    # 8 KV groups -> 4.8 -> 5, which two devices cannot share
    nearest = "5 key/value heads; .* the nearest sizes are 4 and 6: width kv=4"
    with pytest.raises(InputError, match=nearest):
        prune(dense, "width", 0.4)
    # tokens that skip a sublayer are not reduced over the devices either
    reduced = prune(dense, "dynamic_depth", 0.5)
    inside = reduced.is_role("all_reduce") & (reduced.layer >= 0)
    assert float((reduced.read_bytes * reduced.count)[inside].sum()) == pytest.approx(
        2 * 32 * 2 * 4096 * 2
    )


def shapes(w: Workload, *roles: str) -> dict[str, list[tuple[int, int, int]]]:
    out: dict[str, list[tuple[int, int, int]]] = {}
    for i in np.flatnonzero(w.is_role(*roles)):
        out.setdefault(ROLES[w.role[i]], []).append((int(w.m[i]), int(w.n[i]), int(w.k[i])))
    return out


def only(w: Workload, role: str, column: str) -> float:
    rows = w.is_role(role)
    assert rows.sum() == 1
    return float(getattr(w, column)[rows][0])


def moved(w: Workload, role: str) -> float:
    rows = w.is_role(role)
    return float(((w.read_bytes + w.write_bytes) * w.count)[rows].sum())


@pytest.mark.quick
def test_semi_structured_and_unstructured_keep_shapes() -> None:
    w = workload(MHA)
    sparse = prune(w, "semi_structured", 0.5)
    rows = w.is_role("q", "k", "v", "o", "up", "down")
    assert (sparse.kernel[rows] == Kernel.SPARSE24).all()
    assert (sparse.kernel[~rows] == Kernel.DENSE).all()
    assert (sparse.m == w.m).all()
    one = prune(w, "semi_structured", {"down": 0.5})
    assert (one.kernel != Kernel.DENSE).tolist() == w.is_role("down").tolist()
    scattered = prune(w, "unstructured", {"attention": 0.6, "o": 0.2, "mlp": 0.0})
    assert set(scattered.density[w.is_role("q", "k", "v")]) == {0.4}
    assert only(scattered, "o", "density") == 0.8
    assert only(scattered, "down", "kernel") == Kernel.DENSE


@pytest.mark.quick
def test_low_rank_pairs_stand_next_to_each_other() -> None:
    w = workload(MHA)  # down: N 96, K 384 -> 0.5 * 36864 / 480 = 38 -> 48
    pruned = prune(w, "low_rank", {"down": 0.5})
    assert shapes(pruned, "down") == {"down": [(96, 48, 384), (96, 96, 48)]}
    at = np.flatnonzero(pruned.is_role("down"))
    assert pruned.stage[at].tolist() == [1, 2]
    assert at[1] == at[0] + 1
    assert pruned.params[at].tolist() == [48 * 384, 96 * 48 + 96]
    assert shapes(prune(w, "low_rank", {"down": 0.5}, align=1), "down")["down"][0] == (96, 38, 384)
    tiny = prune(workload(GQA), "low_rank", 0.01)
    first = tiny.stage == 1
    assert (tiny.n[first] <= np.minimum(tiny.k[first], tiny.n[tiny.stage == 2])).all()


@pytest.mark.quick
def test_dynamic_depth_at_batch_one_is_all_or_nothing() -> None:
    w = workload(GQA, "decode", 1)
    pruned = prune(w, "dynamic_depth", 0.25, kernel="gathered")
    for role in ("q", "o", "attention", "gate", "up", "activation", "down", "mlp_norm"):
        assert only(pruned, role, "count") == pytest.approx(4.5)
    for role in ("k", "v", "attention_norm", "cache_write", "rotary"):
        assert only(pruned, role, "count") == 6
    assert not pruned.is_role("gather", "scatter").any()
    assert pruned.is_role("router").sum() == 2
    assert moved(pruned, "rotary") / moved(w, "rotary") == pytest.approx((8 * 0.75 + 4) / 12)
    skipped = prune(w, "dynamic_depth", 0.25, prune_kv=True, kernel="gathered")
    assert (
        only(skipped, "k", "count")
        == only(skipped, "attention_norm", "count")
        == pytest.approx(4.5)
    )
    assert only(skipped, "attention", "kv_len") == 37  # 0.75 * 49 = 36.75


@pytest.mark.quick
def test_dynamic_depth_in_a_batch_is_binomial() -> None:
    pruned = prune(workload(GQA, "decode", 2), "dynamic_depth", 0.25, kernel="gathered")
    at = pruned.is_role("down")
    assert pruned.m[at].tolist() == [1, 2]
    assert pruned.count[at] == pytest.approx([6 * 2 * 0.75 * 0.25, 6 * 0.75**2])
    attention = pruned.is_role("attention")
    assert pruned.batch[attention].tolist() == [1, 2]
    for role in ("gather", "scatter"):
        rows = pruned.is_role(role)
        assert pruned.overhead[rows].all()
        # 1.5 of 2 tokens expected, in 2 sublayers of 6 layers, 64 features of 2 bytes read and
        # written, an index of 4
        assert moved(pruned, role) == pytest.approx(1.5 * 12 * (2 * 64 * 2 + 4))
    assert pruned.overhead.sum() == 2 + 2 * 2 * 2


@pytest.mark.quick
def test_kernels_of_the_reference_bench_skip_tiles_and_see_all_tokens_elsewhere() -> None:
    """Counted by hand from the bench's code: one layer of 64 features, inner width 176, 8 + 4 heads
    of 16 features."""
    w = workload(GQA, "decode", 4)
    pruned = prune(w, "dynamic_depth", 0.25)
    routed = pruned.is_role("q", "o", "gate", "up", "down")
    assert set(pruned.kernel[routed]) == {Kernel.BLOCK_SPARSE}
    assert moved(pruned, "product") == moved(w, "activation")
    assert not pruned.is_role("activation", "gather", "scatter").any()
    for role in ("mlp_norm", "rotary"):
        assert moved(pruned, role) == moved(w, role)
    # zeros under q, o, gate, up, down and the attention's result: 4 tokens, 2 bytes, 6 layers
    assert moved(pruned, "fill") == 6 * 4 * 2 * (2 * 128 + 64 + 2 * 176 + 64)
    counted = {
        role: float(pruned.count[pruned.is_role(role)].sum())
        for role in ("router", "select", "sort", "fill")
    }
    assert counted == {"router": 12, "select": 24, "sort": 24, "fill": 36}
    assert not prune(workload(GQA, "decode", 1), "dynamic_depth", 0.25).is_role("sort").any()
    both = prune(prune(w, "dynamic_depth", 0.25), "semi_structured", 0.5)
    assert set(both.kernel[both.is_role("up")]) == {Kernel.SPARSE24}
    assert prune(w, "dynamic_depth", 0.25, kernel="ideal") == prune(
        w, "dynamic_depth", 0.25, ideal=True
    )


@pytest.mark.quick
def test_kernels_of_dynamic_width_copy_once_or_per_group() -> None:
    w = workload(MHA, "prefill", 2)
    tiles, gathered, looped = (
        prune(w, "dynamic_width", 0.5, kernel=k) for k in ("reference", "gathered", "looped")
    )
    assert set(tiles.kernel[tiles.is_role("up")]) == {Kernel.GROUPS_N}
    assert set(tiles.kernel[tiles.is_role("down")]) == {Kernel.GROUPS_K}
    assert set(tiles.block[tiles.is_role("up")]) == {384 // 32}
    assert not tiles.is_role("gather", "scatter").any()
    for role in ("gather", "scatter"):
        assert moved(looped, role) == pytest.approx(moved(gathered, role))
    once, per_group = (
        float(p.count[p.is_role("scatter") & (p.part == 2)].sum()) for p in (gathered, looped)
    )
    assert per_group == pytest.approx(32 * once)
    sorts = [float(p.count[p.is_role("sort")].sum()) for p in (tiles, gathered, looped)]
    assert sorts == [3 * 2 * 5, 2 * 5, 2 * 5]


@pytest.mark.quick
def test_vectors_alone_gain_from_scattered_zeros() -> None:
    alone = prune(workload(GQA, "decode", 1), "unstructured", 0.5, kernel="spmv")
    assert set(alone.kernel[alone.is_role("q", "down")]) == {Kernel.SPMV}
    several = prune(workload(GQA, "decode", 2), "unstructured", 0.5, kernel="spmv")
    assert set(several.kernel[several.is_role("q", "down")]) == {Kernel.UNSTRUCTURED}


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_dynamic_width_reads_the_union_of_the_groups(batch: int) -> None:
    w = workload(MHA, "decode", batch)
    s = 0.75
    pruned = prune(w, "dynamic_width", s)
    used = 1 - s**batch
    width = -(-int(np.ceil(384 * used - 1e-9)) // 16) * 16
    tokens = int(np.ceil(batch * 0.25 / used - 1e-9))
    assert shapes(pruned, "up", "down") == {
        "up": [(tokens, width, 96)],
        "down": [(tokens, 96, width)],
    }
    assert only(pruned, "down", "density") <= 1
    assert shapes(pruned, "k", "v") == shapes(w, "k", "v")
    assert only(pruned, "attention", "density") == 0.25
    assert moved(pruned, "activation") == pytest.approx(0.25 * moved(w, "activation"))
    assert moved(pruned, "rotary") == pytest.approx((6 * 0.25 + 6) / 12 * moved(w, "rotary"))
    assert only(pruned, "up", "weight_bytes_each") == width * 96 * 2
    assert pruned.overhead.sum() == 4
    assert shapes(pruned, "router") == {"router": [(batch, 6, 96), (batch, 32, 96)]}


@pytest.mark.quick
@pytest.mark.parametrize("block", [16, 64, 128])
def test_sparse_attention_scores_blocks(block: int) -> None:
    w = workload(GQA, "prefill", 2, 256)
    pruned = prune(w, "sparse_attention", 0.4, block=block)
    assert (only(pruned, "attention", "density"), only(pruned, "attention", "block")) == (
        0.6,
        block,
    )
    assert only(pruned, "mask", "write_bytes") == 2 * 8 * (256 / block) ** 2 * 4
    assert only(pruned, "mask", "read_bytes") == 2 * 256 * (8 + 4) * 16 * 2
    assert only(pruned, "select", "read_bytes") == only(pruned, "mask", "write_bytes")
    assert only(pruned, "select", "write_bytes") == pytest.approx(
        0.6 * only(pruned, "select", "read_bytes")
    )
    decode = prune(workload(GQA, "decode", 2, 255), "sparse_attention", 0.4, block=block)
    assert only(decode, "mask", "read_bytes") == 2 * 16 * 2 * (8 + 4 * 2 * 256 / block)
    query, full = (
        2 * 2 * 8 * 16 * 2 * 6,
        only(workload(GQA, "decode", 2, 255), "attention", "bytes"),
    )
    assert only(decode, "attention", "bytes") - query == pytest.approx(0.6 * (full - query))


@pytest.mark.quick
def test_token_drops_from_a_layer_on_and_from_the_cache() -> None:
    w = workload(GQA, "generate", 2, 48, 3)
    pruned = prune(w, "token", 0.5)
    for role in ("q", "down", "mlp_norm"):
        rows = pruned.is_role(role) & (pruned.phase == 0)
        assert (pruned.m[rows].tolist(), pruned.count[rows].tolist()) == ([96, 48], [2, 4])
    rows = pruned.kind == Kind.PREFILL_ATTENTION
    assert list(zip(pruned.q_len[rows], pruned.kv_len[rows], pruned.count[rows])) == [
        (48, 48, 2),
        (24, 24, 4),
    ]
    rows = pruned.kind == Kind.DECODE_ATTENTION
    lengths = [(25, 4), (26, 4), (27, 4), (49, 2), (50, 2), (51, 2)]
    assert sorted(zip(pruned.kv_len[rows], pruned.count[rows])) == lengths
    assert shapes(pruned, "lm_head") == shapes(w, "lm_head")
    assert (only(pruned, "select", "count"), only(pruned, "gather", "count")) == (1, 1)
    assert only(pruned, "gather", "m") == 48
    assert only(pruned, "select", "read_bytes") == 2 * 48 * 8 * 4
    assert not prune(w, "token", 0.5, mode="static").is_role("select").any()
    everywhere = prune(
        w.replace(m=np.where(w.is_role("lm_head") & (w.phase == 0), 96, w.m)), "token", 0.5
    )
    assert everywhere.m[everywhere.is_role("lm_head")].tolist() == [48, 2]


@pytest.mark.quick
def test_kv_cache_keeps_what_is_generated_and_pays_at_prefill() -> None:
    w = workload(GQA, "generate", 2, 48, 3)
    pruned = prune(w, "kv_cache", 0.9)  # 4.8 -> 5 of 48
    assert pruned.kv_len[pruned.kind == Kind.DECODE_ATTENTION].tolist() == [6, 7, 8]
    assert only(pruned, "select", "count") == 6
    assert pruned.meta.applied[-1].realised == pytest.approx(43 / 48)
    key, scores = 2 * 4 * 16 * 2, 2 * 8 * 32 * 48 * 4
    assert only(pruned, "mask", "read_bytes") == key * 48 + scores
    assert only(pruned, "mask", "write_bytes") == scores
    assert only(pruned, "select", "read_bytes") == 4 * 2 * 4 * 48
    assert only(pruned, "select", "write_bytes") == 4 * 2 * 4 * 5
    assert (
        only(pruned, "gather", "read_bytes") == only(pruned, "gather", "write_bytes") == key * 2 * 5
    )
    dense = workload(GQA, "prefill")
    only_prefill = prune(dense, "kv_cache", 0.5)
    assert only_prefill.take(~only_prefill.overhead).replace(meta=dense.meta) == dense
    assert only_prefill.overhead.sum() == 3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("family", "phase"), [("kv_cache", "decode"), ("kv_cache", "serve"), ("token", "generate")]
)
def test_a_copied_cache_shrinks_with_its_positions(family: str, phase: str) -> None:
    more = {} if phase == "decode" else {"new_tokens": 16}
    dense = lower(load_model("llama-3.1-8b"), phase=phase, batch=4, seq=4096, engine="hf", **more)
    pruned = prune(dense, family, 0.5)
    copied, before = (moved(w.take(w.kv_len > 0), "cache_write") for w in (pruned, dense))
    assert 0.45 < copied / before < 0.56
    paged = lower(load_model("llama-3.1-8b"), phase=phase, batch=4, seq=4096, **more)
    assert moved(paged.take(paged.kv_len > 0), "cache_write") == 0.0


@pytest.mark.parametrize("phase", ["decode", "generate"])
@pytest.mark.parametrize(
    ("text", "heads", "kv_heads"),
    [
        ("width kv=0.5", 32, 4),
        ("width heads=0.5", 16, 8),
        ("width kv=0.75 heads=0.25", 24, 2),
        ("width 0", 32, 8),
    ],
)
def test_a_copied_cache_is_repeated_for_each_query_head(
    text: str, phase: str, heads: int, kv_heads: int
) -> None:
    """Transformers repeat keys and values for every query head: fewer KV heads are repeated more
    often."""
    model = load_model("llama-3.1-8b")
    request = {
        "phase": phase,
        "batch": 2,
        "seq": 1000,
        "new_tokens": 7 if phase == "generate" else 0,
        "engine": "hf",
    }
    pruned = prune(lower(model, **request), text)
    stored = lower(resized(model, heads=heads, kv_heads=kv_heads), **request)
    for name in ("read_bytes", "write_bytes", "bytes", "flops"):
        assert getattr(pruned, name).sum() == pytest.approx(getattr(stored, name).sum(), rel=1e-12)


LEFT = [0.0, 0.0, 0.0, 0.5, 0.5, 0.5]  # half of the tokens exit after three of six layers
EXITS = {"unit": "layer", "router": 1, "kernel": "gathered"}


def total(w: Workload, role: str) -> float:
    return float(w.count[w.is_role(role) & (w.layer >= 0)].sum())


@pytest.mark.quick
def test_half_of_the_tokens_exit_and_all_leave_keys_and_values() -> None:
    w = workload(GQA, "decode", 1, 48)
    pruned = prune(w, "dynamic_depth", LEFT, **EXITS)
    # 64 features, 8 heads of 16, inner width 176, 49 cached positions
    skipped = 2 * 64 * 128 * 2 + 2 * 3 * 64 * 176 + 2 * 8 * 2 * 16 * 49
    classifiers = 3 * 2 * 64  # one before each layer that some tokens skip
    assert w.flops.sum() - pruned.flops.sum() == pytest.approx(3 * 0.5 * skipped - classifiers)
    for role in ("k", "v"):
        assert total(pruned, role) == total(w, role) == 6
    for role in ("q", "o", "attention", "gate", "up", "down", "mlp_norm"):
        assert total(pruned, role) == pytest.approx(3 + 3 * 0.5)
    assert total(pruned, "router") == 3
    assert pruned.meta.applied[0].sparsity == pruned.meta.applied[0].realised == 0.25


@pytest.mark.quick
def test_tokens_are_copied_once_per_layer_or_once_per_sublayer() -> None:
    w = workload(GQA, "decode", 2)
    # one of two tokens on average: 64 features read and written, and an index
    each = 1 * (2 * 64 * 2 + 4)
    for unit, times in (("layer", 3), ("sublayer", 6)):
        pruned = prune(w, "dynamic_depth", LEFT, **{**EXITS, "unit": unit})
        for role in ("gather", "scatter"):
            assert moved(pruned, role) == pytest.approx(times * each)
        assert total(pruned, "router") == times
    masked = prune(w, "dynamic_depth", LEFT, unit="layer")
    assert (total(masked, "select"), total(masked, "sort")) == (2 * 3, 2 * 3)


@pytest.mark.quick
def test_layerskip_keeps_the_first_layers_with_their_windows() -> None:
    w = lower(load_model("gemma-2-9b"), phase="decode", batch=1, seq=8192, engine="")
    first = w.expand()
    first = first.take(first.is_attention & (first.layer < 21))
    exited = METHODS["layerskip"].prune(w, 0.5).expand()
    exited = exited.take(exited.is_attention)
    assert exited.window.tolist() == first.window.tolist()
    assert exited.layer.tolist() == list(range(21))
    deepest_but_one = prune(w, "depth", 0.5).expand()
    assert deepest_but_one.window[deepest_but_one.is_attention].tolist() != first.window.tolist()
