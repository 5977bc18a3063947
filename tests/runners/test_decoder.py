"""The real decoder: each pruned forward pass against a dense one in float64, with the removed parts
masked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import shaped

torch = pytest.importorskip("torch", reason="torch is not installed")

from decoder_reference import (  # noqa: E402
    ALL,
    BATCH,
    CONFIG,
    LAYER,
    LAYERS,
    PROMPT,
    TOKENS,
    Masks,
    check,
    layout_mask,
    reference,
    run,
)
from fakes.interpreted import CPU, META, PLACE, kernels  # noqa: E402
from shaped import Attention, LatentAttention, Layer, each_sublayer, resized  # noqa: E402
from torch.nn.attention import flex_attention  # noqa: E402, F401 (torch 2.7 computes with tensors of the host to import it)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from calibration.devices.protocol import Unsupported  # noqa: E402
from calibration.runners.cases import cases_of, fewer_layers  # noqa: E402
from calibration.runners.decoder import families  # noqa: E402
from calibration.runners.decoder.families import (  # noqa: E402
    DYNAMIC,
    STATIC,
    each_projection,
    prune_decoder,
    two_of_four,
)
from calibration.runners.decoder.model import (  # noqa: E402
    Decoder,
    Rule,
    decode,
    from_weights,
    prefill,
    random_decoder,
)
from calibration.runners.decoder.steps import check_steps, prune_by_steps  # noqa: E402
from calibration.runners.decoder.timing import check_shapes  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.models.model import Model  # noqa: E402
from simulator.pruning import general_families  # noqa: E402
from simulator.pruning._steps import read_steps  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of a tiny model wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile"),
    # in rows that are undefined and unread
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]


NORMED = each_sublayer(
    CONFIG, lambda s: replace(s, qkv_bias=True, norm="head") if isinstance(s, Attention) else s
)


@pytest.fixture(scope="module")
def dense() -> Decoder:
    return random_decoder(CONFIG, dtype="fp32", seed=1)


@pytest.fixture(params=["cpu", CPU if PLACE == "cpu" else PLACE], ids=["host", "device"])
def routed(request: pytest.FixtureRequest) -> Decoder:
    """A dense decoder whose routers are read by the host, or by kernels, which the GPU runs or a
    CPU interprets."""
    if request.param != "cpu" or request.param is CPU:
        kernels()
    few = 2 if request.param is CPU else LAYERS  # an interpreter is slow
    made = random_decoder(fewer_layers(NORMED, few), dtype="fp32", seed=1)
    return replace(_moved(made, request.param), device=request.param)


def _ran(pruned: Decoder) -> Any:
    """Logits of :func:`run` on the decoder's device, moved to the CPU."""
    return run(pruned, TOKENS.to(pruned.embedding.device)).cpu()


def _noted(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    decision: Any = lambda result, *_: result,
) -> list[Any]:
    """Return a list that receives the decisions of a function, from its result and arguments."""
    found, given = list[Any](), getattr(owner, name)

    def noted(*args: Any) -> Any:
        result = given(*args)
        found.append(decision(result, *args).cpu())
        return result

    monkeypatch.setattr(owner, name, noted)
    return found


@pytest.mark.parametrize("config", [CONFIG, replace(NORMED, tied=True)])
def test_dense_prefill_and_decode_equal_the_reference(config: Model) -> None:
    made = random_decoder(config, dtype="fp32", seed=2)
    assert (made.head is made.embedding) == config.tied
    check(run(made), reference(made, TOKENS))


def test_a_checkpoint_s_names(dense: Decoder) -> None:
    weights = {"model.embed_tokens.weight": dense.embedding, "model.norm.weight": dense.final_norm}
    weights["lm_head.weight"] = dense.head
    for number, layer in enumerate(dense.layers):
        for at, norm, part in (
            ("self_attn", "input", layer.attention),
            ("mlp", "post_attention", layer.mlp),
        ):
            weights[f"model.layers.{number}.{norm}_layernorm.weight"] = part.norm
            for role in part.roles:
                weights[f"model.layers.{number}.{at}.{role}_proj.weight"] = getattr(
                    part, role
                ).weight
    loaded = from_weights("tiny", weights, head_dim=CONFIG.head_dim)
    assert torch.equal(run(loaded), run(dense))
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"no weight 'model.layers.1.mlp.up_proj.weight'"):
        from_weights("tiny", weights, head_dim=CONFIG.head_dim)


def _zeroed(
    decoder: Decoder, number: int, role: str, rows: Any = ALL, columns: Any = ALL
) -> Decoder:
    """The decoder with part of one weight set to zero."""

    def change(i: int, name: str, p: Any) -> Any:
        if (i, name) != (number, role):
            return p
        weight = p.weight.clone()
        weight[rows, columns] = 0.0
        return replace(p, factors=(weight,))

    return each_projection(decoder, change)


def _missing(rows: Any, among: Any) -> Any:
    """Numbers of the rows of ``among`` that are not in ``rows``."""
    there = (among[:, None] == rows[None]).all(-1).any(1)
    assert int(there.sum()) == len(rows)  # every row kept is one of the dense ones
    return (~there).nonzero().squeeze(1)


@pytest.mark.parametrize("unit", ["layer", "attention", "mlp"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_depth(dense: Decoder, unit: str, sparsity: float) -> None:
    many = round(sparsity * LAYERS + 1e-9)
    masked = dense
    for number in range(LAYERS - 1 - many, LAYERS - 1):
        if unit != "mlp":
            masked = _zeroed(masked, number, "o")
        if unit != "attention":
            masked = _zeroed(masked, number, "down")
    pruned = prune_decoder(dense, "depth", sparsity, unit=unit)
    missing = {"layer": 7, "attention": 4, "mlp": 3}[unit] * many
    assert len(list(pruned.projections())) == 7 * LAYERS - missing
    check(run(pruned), reference(masked, TOKENS))


@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_width(dense: Decoder, sparsity: float) -> None:
    pruned, masked = prune_decoder(dense, "width", sparsity), dense
    for number, (after, before) in enumerate(zip(pruned.layers, dense.layers, strict=True)):
        assert after.attention.kv_heads == {0.25: 3, 0.6: 2}[sparsity]
        heads = _missing(after.attention.q.weight, before.attention.q.weight)
        channels = _missing(after.mlp.up.weight, before.mlp.up.weight)
        masked = _zeroed(
            _zeroed(masked, number, "o", columns=heads), number, "down", columns=channels
        )
    check(run(pruned), reference(masked, TOKENS))


@pytest.mark.parametrize(
    ("text", "heads"), [("heads=0.5", (4, 4)), ("attention=0.5 heads=0.5", (2, 2))]
)
def test_query_heads_alone_keep_their_key_and_value(
    dense: Decoder, text: str, heads: tuple[int, int]
) -> None:
    steps = [step.of_family for step in read_steps(f"width {text} layers=1-3")]
    pruned, masked = prune_by_steps(dense, steps), dense
    first, *others = pruned.layers
    assert torch.equal(first.attention.q.weight, dense.layers[0].attention.q.weight)
    for number, (after, before) in enumerate(zip(others, dense.layers[1:]), start=1):
        assert (after.attention.heads, after.attention.kv_heads) == heads
        assert torch.equal(after.mlp.up.weight, before.mlp.up.weight)
        masked = _zeroed(
            masked,
            number,
            "o",
            columns=_missing(after.attention.q.weight, before.attention.q.weight),
        )
    check(run(pruned), reference(masked, TOKENS))


def _texts(many: int) -> Iterator[str]:
    """Random texts of static families at parts, layers and units."""
    rng = np.random.default_rng(7)
    parts = {
        "width": ("attention", "heads", "kv", "mlp"),
        "low_rank": ("q", "qkv", "o", "attention", "mlp", "down"),
    }

    def step() -> str:
        family = str(rng.choice([*parts, "depth", "width_cross", "unstructured"]))
        fraction = float(rng.choice([0.25, 0.5, 0.6]))
        listed = sorted(rng.choice(LAYERS, int(rng.integers(1, LAYERS)), replace=False).tolist())
        layers = f" layers={','.join(map(str, listed))}" if rng.random() < 0.5 else ""
        if family == "depth":
            return f"depth {fraction}{layers}"
        if family in parts and rng.random() < 0.7:
            some = rng.choice(parts[family], int(rng.integers(1, 3)), replace=False).tolist()
            return " ".join([family, *(f"{part}={fraction}" for part in some)]) + layers
        return f"{family} {fraction}" + ("" if family == "width_cross" else layers)

    for _ in range(many):
        yield " + ".join(step() for _ in range(int(rng.integers(1, 4))))


def test_what_runs_of_random_texts_has_the_shapes_that_are_predicted(dense: Decoder) -> None:
    ran, refused = 0, list[str]()
    for text in _texts(120):
        try:
            (case,), _ = cases_of(CONFIG, {"seq": 8, "prune": [text], "engine": ""})
            check_steps(case.steps)
            pruned = prune_by_steps(dense, case.steps)
        except InputError as error:
            refused.append(str(error))
            continue
        check_shapes(pruned, case.pruned)
        ran += 1
        if ran <= 15:
            assert torch.isfinite(run(pruned)).all(), text
    assert ran > 60
    assert not any("\n" in reason for reason in refused)


def test_width_cross(dense: Decoder) -> None:
    pruned = prune_decoder(dense, "width_cross", 0.3)
    assert pruned.hidden == 80
    gone = _missing(pruned.embedding.t(), dense.embedding.t())
    embedding = dense.embedding.clone()
    embedding[:, gone] = 0.0
    masked = replace(dense, embedding=embedding)
    for number in range(LAYERS):
        masked = _zeroed(_zeroed(masked, number, "o", rows=gone), number, "down", rows=gone)
    check(run(pruned), reference(masked, TOKENS))


def test_low_rank(dense: Decoder) -> None:
    pruned = prune_decoder(dense, "low_rank", 0.4)
    for _, _, projection in pruned.projections():
        first, second = projection.factors
        assert first.shape[0] == second.shape[1] < min(first.shape[1], second.shape[0])
    check(run(pruned), reference(pruned, TOKENS))
    # square weights
    config = resized(CONFIG, heads=2, kv_heads=2, head_dim=48, rotary=48, inner=96)
    made = random_decoder(config, dtype="fp32")
    whole = prune_decoder(made, "low_rank", 0.4, align=96)  # full rank changes nothing
    check(run(whole), reference(made, TOKENS))


def test_unstructured(dense: Decoder) -> None:
    pruned = prune_decoder(dense, "unstructured", 0.5)
    for (_, _, after), (_, _, before) in zip(
        pruned.projections(), dense.projections(), strict=True
    ):
        zero = after.weight == 0
        assert float(zero.float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert torch.equal(after.weight[~zero], before.weight[~zero])
        assert before.weight[zero].abs().max() <= before.weight[~zero].abs().min()
    check(run(pruned), reference(pruned, TOKENS))


def test_two_of_four_keeps_the_larger_half_and_is_refused_by_name_on_a_cpu(dense: Decoder) -> None:
    weight = torch.randn(6, 32)
    fours, kept = weight.view(6, 8, 4).abs(), two_of_four(weight).view(6, 8, 4).abs()
    assert torch.equal((kept > 0).sum(-1), torch.full((6, 8), 2))
    torch.testing.assert_close(kept.sum(-1), fours.sort(-1).values[..., 2:].sum(-1))
    with pytest.raises(InputError, match="expected a multiple of 4"):
        two_of_four(torch.randn(2, 6))
    with pytest.raises(Unsupported, match=r"semi_structured \(2:4\) needs sparse tensor cores"):
        prune_decoder(dense, "semi_structured", 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_semi_structured_on_a_gpu() -> None:
    config = resized(CONFIG, hidden=256, head_dim=32, rotary=32, inner=512)
    made = random_decoder(config, dtype="bf16", device="cuda")
    pruned = prune_decoder(made, "semi_structured", 0.5)
    masked = each_projection(made, lambda i, role, p: replace(p, factors=(two_of_four(p.weight),)))
    tokens = TOKENS.to("cuda")
    first, second = run(pruned, tokens).float(), run(masked, tokens).float()
    assert float((first - second).norm() / second.norm()) < 0.05


def _rows(places: Any, length: int) -> Any:
    """Places (batch, chosen) as booleans (batch, length)."""
    return torch.zeros(places.shape[0], length, dtype=torch.bool).scatter_(1, places, True)


@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_dynamic_depth(routed: Decoder, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = prune_decoder(routed, "dynamic_depth", sparsity, seed=3)
    positions = _noted(monkeypatch, families.TokenRouting, "_chosen", lambda result, *_: result[1])
    # decode on a device
    active = _noted(monkeypatch, families.TokenRouting, "_drawn", lambda result, *_: result[2])
    logits = _ran(pruned)
    masks, length = Masks(), TOKENS.shape[1]
    for at, (number, what) in enumerate(
        itertools.product(range(len(routed.layers)), ("attention", "mlp"))
    ):
        first, *steps = (positions + active)[at :: 2 * len(routed.layers)]
        assert first.shape == (BATCH, round((1 - sparsity) * PROMPT + 1e-9))
        ran = _rows(first, length)
        for step, chosen in enumerate(steps):
            ran[chosen, PROMPT + step] = True
        masks[what, number] = ran
    check(logits, reference(_moved(routed, "cpu"), TOKENS, masks))


def test_a_device_draws_the_same_number_and_runs_the_sequences_the_router_wants_most() -> None:
    torch.manual_seed(0)
    rule = families.TokenRouting(0.7)
    router, x = torch.randn(2, CONFIG.hidden), torch.randn(8, 1, CONFIG.hidden)
    wanted = (x[:, 0] @ (router[1] - router[0])).argsort(descending=True).tolist()
    counts = []
    for _ in range(400):
        index, count, runs = rule._drawn(router, x)
        assert index.tolist() == wanted
        assert set(runs.nonzero().flatten().tolist()) == set(wanted[: int(count)])
        counts.append(float(count))
    drawn = torch.tensor(counts)
    assert float(drawn.mean()) == pytest.approx(5.6, abs=0.2)
    assert float(drawn.var()) == pytest.approx(8 * 0.3 * 0.7, rel=0.3)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_dynamic_width(routed: Decoder, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def used(result: Any, rule: families.GroupRouting, state: Any, part: Any, x: Any) -> Any:
        return rule._mask(state, *result, len(part.router)).view(*x.shape[:2], -1)

    pruned = prune_decoder(routed, "dynamic_width", sparsity, channel_groups=7)
    found = _noted(monkeypatch, families.GroupRouting, "_choice", used)
    logits = _ran(pruned)
    masks, many = Masks(), 2 * len(routed.layers)
    of_group = torch.arange(CONFIG.inner) // -(-CONFIG.inner // 7)
    for number in range(len(routed.layers)):
        masks["groups", number] = torch.cat(found[2 * number :: many], 1)
        masks["channels", number] = torch.cat(found[2 * number + 1 :: many], 1)[..., of_group]
        counts = set(masks["groups", number].sum(-1).flatten().tolist())
        assert counts == {0.3: {2, 3}, 0.5: {2}}[sparsity]  # in turn, so that their mean is exact
    check(logits, reference(_moved(routed, "cpu"), TOKENS, masks))


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_sparse_attention(
    routed: Decoder, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 16
    pruned = prune_decoder(routed, "sparse_attention", sparsity, block=block)
    tables = _noted(monkeypatch, families.BlockAttention, "_table")
    chosen = _noted(monkeypatch, families, "best")
    logits = _ran(pruned)
    masks, length, whole = Masks(), TOKENS.shape[1], PROMPT // block
    for number in range(len(routed.layers)):
        seen = torch.zeros(BATCH, CONFIG.kv_heads, length, length, dtype=torch.bool)
        seen[:, :, :PROMPT, :PROMPT] = layout_mask(tables[number], PROMPT, PROMPT, block)
        for step, index in enumerate(chosen[number :: len(routed.layers)]):
            assert index.shape[-1] == round((1 - sparsity) * whole + 1e-9)
            blocks = torch.zeros(BATCH, CONFIG.kv_heads, whole, dtype=torch.bool).scatter_(
                -1, index, True
            )
            seen[:, :, PROMPT + step, : whole * block] = blocks.repeat_interleave(block, -1)
            seen[:, :, PROMPT + step, whole * block :] = True
        masks["seen", number] = seen
        kept = tables[number].sum(1).tolist()
        assert kept == [
            max(1, -int(-(1 - sparsity) * (row + 1) // 1)) for row in range(-(-PROMPT // block))
        ]
    check(logits, reference(_moved(routed, "cpu"), TOKENS, masks))


class Launched:
    """Stands for Triton's kernels: results have the right shape and no values."""

    @staticmethod
    def rotary(x: Any, *tables: Any) -> Any:
        return torch.empty_like(x)

    @staticmethod
    def gated(gate: Any, up: Any) -> Any:
        return torch.empty_like(gate)

    @staticmethod
    def tiles_of(mask: Any) -> Any:
        return mask

    @staticmethod
    def gather_gemm(x: Any, weight: Any, *_: Any, out: Any = None, add: bool = False) -> Any:
        return x.new_empty(len(x), len(weight)) if out is None else out

    @staticmethod
    def grouped_columns(
        x: Any, weight: Any, tiles: Any, bias: Any = None, gated: bool = False
    ) -> Any:
        return x.new_empty(len(x), len(weight) // (1 + gated))

    @staticmethod
    def grouped_features(x: Any, weight: Any, tiles: Any) -> Any:
        return x.new_empty(len(x), weight.shape[1])


class OnDevice(TorchDispatchMode):  # type: ignore[misc]
    """Refuses operators on tensors of the host, because a graph cannot capture a copy from the
    host."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = tree_leaves((args, kwargs))
        assert all(x.is_meta for x in given if isinstance(x, torch.Tensor)), (
            f"{function} of a tensor of the host"
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["", *DYNAMIC])
def test_passes_on_a_gpu_read_no_data(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes in a CUDA graph must not depend on data; meta tensors have no data."""
    monkeypatch.setattr("calibration.devices.operators.kernels", lambda: Launched)
    monkeypatch.setattr("calibration.devices.operators.find_spec", lambda name: True)
    monkeypatch.setattr(
        "calibration.devices.attention._attend", lambda q, *_, **__: torch.empty_like(q)
    )
    made = random_decoder(CONFIG, dtype="fp32")
    pruned = prune_decoder(made, family, 0.5) if family else made
    assert pruned.rule is None or not pruned.rule.on_host(META)
    weightless, tokens = replace(_moved(pruned, "meta"), device=META), TOKENS.to("meta")
    with OnDevice():
        logits, state = prefill(weightless, tokens[:, :PROMPT])
        assert logits.shape == decode(weightless, tokens[:, :1], state).shape
    with pytest.raises(AssertionError, match="host"), OnDevice():
        torch.tensor([1]).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        logits.argmax(-1).tolist()  # meta tensors refuse a read of data


def _moved(value: Any, place: str) -> Any:
    """A decoder, or a part of it, with its tensors on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(place)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, place) for part in value)
    if isinstance(value, dict):
        return {name: _moved(part, place) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, Rule):
        return replace(
            value,
            **{f.name: _moved(getattr(value, f.name), place) for f in fields(value) if f.init},
        )
    return value


@pytest.mark.parametrize("start", [0, 2, 3])
def test_token(dense: Decoder, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = prune_decoder(dense, "token", 0.4, start=start)
    found = _noted(monkeypatch, families, "best")
    logits = run(pruned)
    places = (
        found[0] if start else torch.linspace(0, PROMPT - 1, 42).round().long().expand(BATCH, -1)
    )
    assert places.shape == (BATCH, 42)
    assert torch.equal(places[:, -1], torch.full((BATCH,), PROMPT - 1))
    there = _rows(places, TOKENS.shape[1])
    there[:, PROMPT:] = True
    seen = there[:, None, None, :] | torch.eye(there.shape[1], dtype=torch.bool)
    masks: Masks = {
        ("seen", number): seen.expand(-1, CONFIG.kv_heads, -1, -1)
        for number in range(start, LAYERS)
    }
    check(logits, reference(dense, TOKENS, masks))
    if start:
        assert not torch.equal(places[0], places[1])  # chosen by what is attended to, not by place
    with pytest.raises(InputError, match="expected a layer from 0 to 3, got 9"):
        prefill(prune_decoder(dense, "token", 0.5, start=9), TOKENS)


@pytest.mark.parametrize("sparsity", [0.25, 0.8])
def test_kv_cache(dense: Decoder, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = prune_decoder(dense, "kv_cache", sparsity, observed=8)
    chosen = _noted(monkeypatch, families, "best")
    logits = run(pruned)
    masks, length = Masks(), TOKENS.shape[1]
    for number in range(LAYERS):
        places = chosen[number]
        assert places.shape[-1] == int((1 - sparsity) * PROMPT + 0.5)
        seen = torch.ones(BATCH, CONFIG.kv_heads, length, length, dtype=torch.bool)
        kept = torch.zeros(BATCH, CONFIG.kv_heads, PROMPT, dtype=torch.bool).scatter_(
            -1, places, True
        )
        seen[:, :, PROMPT:, :PROMPT] = kept[:, :, None]
        masks["seen", number] = seen
    check(logits, reference(dense, TOKENS, masks))


def test_families_compose(dense: Decoder) -> None:
    pruned = prune_decoder(prune_decoder(dense, "depth", 0.25), "width", 0.5)
    again = prune_decoder(pruned, "kv_cache", 0.5)
    assert torch.isfinite(run(again)).all()
    check(run(pruned), reference(pruned, TOKENS))
    with pytest.raises(InputError, match="factorised or sparse already"):
        prune_decoder(prune_decoder(dense, "low_rank", 0.5), "width", 0.5)


def test_every_family_of_the_simulator_is_here_and_nothing_removed_is_the_dense_decoder(
    dense: Decoder,
) -> None:
    assert {*STATIC, *DYNAMIC} == set(general_families())
    assert all(prune_decoder(dense, family, 0.0) is dense for family in general_families())


LATENT = LatentAttention(heads=8, query_rank=0, rank=16, rotary=8, plain=8, value=8)


def _last(other: Layer) -> Model:
    """The model with another last layer."""
    return replace(CONFIG, layers=(*CONFIG.layers[:-1], other))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (resized(CONFIG, gated=False), "not gated"),
        (replace(CONFIG, norm="layer"), "not RMS"),
        (resized(CONFIG, rotary=0, learned_positions=512), "rotary"),
        (CONFIG.each_layer(lambda one: replace(one, parallel=True)), "parallel"),
        (_last(resized(CONFIG, window=128).layers[0]), "window"),
        (replace(CONFIG, logit_softcap=True), "soft-caps"),
        (_last(shaped.layer(8, 4, experts={"experts": 4, "active": 2.0, "inner": 16})), "experts"),
        (_last(LAYER.with_part("attention", LATENT)), "latent"),
        (_last(shaped.layer(inner=160, linear=("attention",))), "linear product"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(config: Model, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        random_decoder(config)
