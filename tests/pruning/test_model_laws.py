"""A pruned model is a model: laws over models, prunings, devices, phases and engines."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simulator
from simulator.errors import InputError
from simulator.models.library import list_models, load_model
from simulator.models.lower import lower
from simulator.models.model import Layer, Model
from simulator.models.sublayers.base import Sublayer
from simulator.models.write import compact, config_content, content_of, states
from simulator.pruning import prune, prune_model
from simulator.pruning.dynamic.rows import merge_runs
from simulator.workload import Workload

pytestmark = pytest.mark.quick

FRACTIONS = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7])
STATIC = (
    *("depth {}", "depth {} unit=attention", "depth attention={} mlp={}", "depth layers=1,3"),
    *("width {}", "width mlp={}", "width heads={} mlp={}", "width hidden={}", "width kv={}"),
    *("width {} layers=0-2", "width_cross {}", "width_cross {} residual_projections=true"),
    *("low_rank {}", "low_rank mlp={}", "semi_structured", "unstructured {} kernel=spmv"),
    *("experts {}", "experts {} merged=true", "experts {} fewer=average", "unstructured q={}"),
    *("width mlp={} + depth {}", "width mlp={} + experts {}", "low_rank {} + semi_structured"),
)
DYNAMIC = (
    *("token {}", "dynamic_depth {}", "dynamic_width {}", "sparse_attention {}", "kv_cache {}"),
    *("token {} start=1", "sparse_attention {} layers=0-3", "kv_cache budget=64"),
    *("dynamic_depth attention={} mlp={}", "token {} + kv_cache {}"),
)
MODELS = tuple(list_models())


@st.composite
def texts(draw: Any, patterns: tuple[str, ...] = STATIC) -> str:
    pattern = draw(st.sampled_from(patterns))
    return pattern.format(*(draw(FRACTIONS) for _ in range(pattern.count("{}"))))


@st.composite
def settings_of(draw: Any, devices: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, Any]:
    return {
        "engine": draw(st.sampled_from(["", "vllm", "hf", "sglang", "trtllm"])),
        "phase": draw(st.sampled_from(["prefill", "decode", "generate", "serve"])),
        "batch": draw(st.sampled_from([1, 3, 32])),
        "seq": draw(st.sampled_from([64, 700])),
        "new_tokens": 5,
        "devices": draw(st.sampled_from(devices)),
        "parallel": draw(st.sampled_from(["tensor", "expert", "pipeline"])),
    }


def pruned_or_none(w: Workload, text: str) -> Workload | None:
    try:
        return prune(w, text)
    except InputError:
        return None


def same_rows(one: Workload, other: Workload) -> bool:
    first, second = merge_runs(one), merge_runs(other)
    return len(first) == len(second) and all(
        np.allclose(getattr(first, name), getattr(second, name), rtol=1e-12, atol=0.0)
        for name in Workload.SCHEMA
    )


@given(st.sampled_from(MODELS), texts(), settings_of(), settings_of())
def test_the_pruned_model_is_the_same_for_all_devices_phases_batches_and_engines(
    name: str, text: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    models = []
    for settings in (first, second):
        try:
            w = lower(name, **settings)
        except InputError:
            return  # the devices cannot share the dense model
        if (pruned := pruned_or_none(w, text)) is not None:
            models.append(pruned.meta.config)
    assert all(model == models[0] for model in models)


@given(st.sampled_from(MODELS), texts(), settings_of(), st.booleans())
def test_pruning_rows_is_pruning_the_model(
    name: str, text: str, settings: dict[str, Any], ideal: bool
) -> None:
    try:
        model = prune_model(load_model(name), text)
        direct = lower(model, **settings, ideal=ideal)
        w = lower(name, **settings)
    except InputError:
        return
    assert same_rows(prune(w, text, ideal=ideal), direct)


@given(st.sampled_from(MODELS), texts(), texts(DYNAMIC), settings_of())
def test_static_and_dynamic_steps_commute(
    name: str, static: str, dynamic: str, settings: dict[str, Any]
) -> None:
    if "layers=" in dynamic and "depth" in static:
        return  # layers have other numbers after depth
    try:
        w = lower(name, **settings)
        first = prune(prune(w, static), dynamic)
        second = prune(prune(w, dynamic), static)
    except InputError:
        return
    assert same_rows(first, second)


@given(st.sampled_from(MODELS), st.sampled_from([0.25, 0.5]), texts(DYNAMIC))
def test_layers_of_dynamic_steps_keep_the_numbers_of_the_dense_model(
    name: str, share: float, dynamic: str
) -> None:
    dense = lower(name, phase="prefill", seq=700)
    last = len(load_model(name).layers) - 1
    text = f"sparse_attention {share} layers={last}"
    pruned = prune(prune(dense, text), f"depth layers=1-{last // 2}")
    sparse = pruned.is_attention & (pruned.density < 1.0)
    if dense.is_attention[dense.layer + dense.layers == last + 1].any():
        assert (pruned.layer[sparse] == last - last // 2).all()
        assert pruned.count[sparse].sum() == 1


def parts_on_every_device(model: Model, devices: int, parallel: str) -> float:
    """Parameters that each device holds: norms, and what sublayers do not divide."""
    hidden, norm = model.hidden, model.norm_parameters
    total = model.final_norm * norm + model.learned_positions * hidden + model.other_parameters
    total += model.embedding_norm * norm + 2 * model.embedding_width * hidden
    total += 2 * (model.streams - 1) * hidden**2
    for layer in model.layers:
        for index, sublayer in enumerate(layer.sublayers):
            if not sublayer.reused:
                total += sum(layer.norms(index, model.pre_norms, model.post_norms)) * norm
                total += sublayer.entry.parameters(hidden) if sublayer.entry else 0
                total += held(sublayer, hidden, devices, parallel)
    return total


def held(s: Sublayer, hidden: int, devices: int, parallel: str) -> float:
    """Return the parameters of a sublayer that each device holds beyond its equal share."""
    share = s.share(devices, parallel).parameters(hidden)
    return (devices * share - s.parameters(hidden)) / max(devices - 1, 1)


@given(st.sampled_from(MODELS), texts(("depth {}", "width {}", "experts {}", "width_cross {}")))
def test_parameters_of_devices_add_up_to_the_model_and_what_all_hold(name: str, text: str) -> None:
    for devices, parallel in itertools.product((1, 2, 4), ("tensor", "expert")):
        try:
            dense = lower(name, phase="decode", devices=devices, parallel=parallel)
            w = prune(dense, text)
        except InputError:
            continue
        model: Model = w.meta.config
        width = model.embedding_width or model.hidden
        padding = -(-model.vocab // devices) * devices - model.vocab
        padding *= width * (1 if model.tied else 2) + model.head_bias
        every = parts_on_every_device(model, devices, parallel)
        whole = model.parameters + padding + (devices - 1) * every
        assert devices * w.parameters == pytest.approx(whole, rel=1e-9)


@given(st.sampled_from(MODELS), texts(), st.sampled_from(["prefill", "generate"]))
def test_a_pipeline_has_the_rows_of_the_whole_model(name: str, text: str, phase: str) -> None:
    try:
        one, two = (
            prune(lower(name, phase=phase, devices=n, parallel="pipeline"), text) for n in (1, 2)
        )
    except InputError:
        return
    inside = two.take(~two.is_role("send"))
    assert same_rows(one, inside)
    assert one.parameters == pytest.approx(two.parameters, rel=1e-12)


WRITTEN = ("depth {}", "width {}", "width mlp={}", "width_cross {}", "experts {}", "depth {}")


@given(st.sampled_from(MODELS), texts(WRITTEN))
def test_what_is_written_is_the_pruned_model(name: str, text: str) -> None:
    dense = load_model(name)
    try:
        pruned = prune_model(dense, text)
        content = config_content(content_of(name), dense, pruned)
    except InputError:
        return
    assert states(content, pruned)
    back = simulator.load_model(content)
    assert back.parameters == compact(pruned).parameters


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3-30b-a3b", "width 0.25"),
        ("llama-3.1-8b", "width 0.3"),
        ("llama-3.1-8b", "depth 0.25"),
        ("gemma-2-9b", "depth 0.25"),
        ("mixtral-8x7b", "experts 0.25"),
        ("deepseek-v2-lite", "experts 0.25"),
        ("qwen3-next-80b-a3b", "experts 0.5"),
        ("phi-3-mini-4k", "width_cross 0.25"),
        ("llama-3.1-8b", "width mlp=0.3 layers=3-5"),
        ("llama-3.1-8b", "depth layers=3-5"),
    ],
)
def test_common_prunings_can_be_written(name: str, text: str) -> None:
    dense = load_model(name)
    content = config_content(content_of(name), dense, prune_model(dense, text))
    assert ("block_configs" in content) == ("mlp=0.3 layers" in text)


def test_the_model_does_not_depend_on_the_order_of_equal_layers() -> None:
    dense = load_model("gemma-2-9b")
    turned = replace(dense, layers=dense.layers[::-1])
    one, other = (
        lower(prune_model(model, "width 0.25"), phase="decode", seq=9000)
        for model in (dense, turned)
    )
    for name in ("flops", "bytes", "params"):
        assert getattr(one, name).sum() == pytest.approx(getattr(other, name).sum(), rel=1e-12)


def test_rows_without_a_model_have_no_static_families_and_no_parts() -> None:
    w = Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4, "layer": 0, "layers": 1}])
    with pytest.raises(InputError, match=r"family depth: expected a workload of simulator\.lower"):
        prune(w, "depth", 0.5)
    with pytest.raises(InputError, match=r"sparsity by part: expected a workload of simulator"):
        prune(w, "dynamic_depth", {"mlp": 0.5})
    assert prune(w, "dynamic_depth", 0.5, ideal=True).flops.sum() == w.flops.sum() / 2


def test_layers_without_sublayers_are_dropped() -> None:
    dense = load_model("llama-3.1-8b")
    pruned = prune_model(dense, "depth attention=0.5 mlp=0.25")
    assert len(pruned.layers) == 24
    assert all(layer.sublayers for layer in pruned.layers)
    assert isinstance(pruned.layers[0], Layer)
