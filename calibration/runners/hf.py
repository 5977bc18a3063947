"""Models of the library Transformers, dense and pruned in alternation, eagerly or compiled, with
random weights.

The library makes the model from a ``config.json`` that states all shapes, or those of the usual
layer. Layers that differ, low-rank factors and missing sublayers are patched into its modules.

A prefill is a forward pass over the prompt that fills the cache and computes the last logits. Eager
decode is the time per token inside the library's ``generate`` after ``seq`` cached positions;
generate is a whole request. A compiled model runs its forward pass under ``torch.compile`` with a
static cache, with CUDA graphs on a GPU.
"""

from __future__ import annotations

import inspect
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from calibration.devices.operators import TORCH_DTYPE, sparse_weight
from calibration.devices.protocol import Device, Sampler, Unsupported
from calibration.records.timing_table import Row
from calibration.runners.cases import (
    UNTIMED,
    Case,
    ModelRun,
    Observation,
    PairRunner,
    alternate,
    looped,
    repeated,
)
from simulator.codes import ROLES, Kernel, Kind
from simulator.errors import InputError
from simulator.models.library import from_hf_config
from simulator.models.model import Layer, Model
from simulator.models.quantization import without_formats
from simulator.models.sublayers import Attention, Experts, Mlp
from simulator.models.sublayers.base import Sublayer
from simulator.models.write import plain_content
from simulator.workload import Workload

# role of a projection -> its module in a decoder layer of Llama and the models derived from it
PROJECTIONS: Mapping[str, str] = {
    **{role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}
# special tokens may lie outside the vocabulary of a small model, and these passes need none
_NEUTRAL: Mapping[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


def pruned_model(w: Workload) -> Model:
    """Return the pruned model of a workload; InputError if the pruning decides during a pass."""
    if (w.overhead & (w.stage == 0)).any() or (w.kernel == Kernel.BLOCK_SPARSE).any():
        raise InputError(
            "it decides during a pass, which no model of Transformers does; use --engine reference"
        )
    model: Model = w.meta.config
    return model


def plain_layer(layer: Layer) -> Layer:
    """Return a layer whose weights are stored plainly."""
    return layer.each(lambda sublayer: replace(sublayer, forms=()))


@dataclass(frozen=True)
class Plan:
    """How the library makes a model: from a configuration that states ``stated``, whose layers are
    then patched to those of ``model``."""

    model: Model
    stated: Model
    config: Any


def check(given: ModelRun, w: Workload) -> Plan:
    """Return how the library makes the model of a workload; InputError if it cannot."""
    from transformers import AutoConfig

    model = pruned_model(w)
    if not given.content:
        raise InputError(f"{model.name}: has no config.json to start from")
    dense = from_hf_config(given.content)
    stated = without_formats(model.each_layer(plain_layer))
    try:
        whole = plain_content(given.content, dense, stated)
    except InputError:
        stated = _usual_model(stated)
        whole = plain_content(given.content, dense, stated)
    try:
        config = AutoConfig.for_model(**{**whole, **_NEUTRAL})
    except Exception as error:  # the library's checks have no public base class
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise InputError(f"Transformers refuses its config.json: {reason}") from None
    if all(isinstance(one, Attention) for one in _sublayers(model, "attention")):
        config.head_dim = model.head_dim
    return Plan(model, stated, config)


def _sublayers(model: Model, part: str) -> list[Sublayer]:
    """Return the different sublayers of a part."""
    found = (layer.of(part) for layer in model.layers)
    return list(dict.fromkeys(sublayer for sublayer in found if sublayer is not None))


def _usual_model(model: Model) -> Model:
    """Return a model of usual layers; InputError if the layers cannot be patched from these."""
    kinds = {type(one) for part in _MODULES for one in _sublayers(model, part)}
    if not kinds <= {Attention, Mlp, Experts} or not all(map(model.usual.has, _MODULES)):
        raise InputError(
            f"a config.json of {model.architecture} cannot state its shapes, and only layers of"
            " attention and an MLP are patched"
        )
    routed = {
        (e.experts, e.active, e.inner) for e in _sublayers(model, "mlp") if isinstance(e, Experts)
    }
    if len(routed) > 1:
        raise InputError(
            "its experts differ by layer; Transformers runs equally many in all layers"
        )
    windowed = (model.usual.with_window(layer.window) for layer in model.layers)
    return model.with_layers(windowed, tuple(range(len(model.layers))))


@dataclass(frozen=True)
class HfModel:
    model: Any
    patched: str  # changes that the configuration cannot state; "" for none

    @property
    def cache_name(self) -> str:
        """Name of the argument for keys and values, by version of the library."""
        names = inspect.signature(type(self.model).forward).parameters
        return "cache" if "cache" in names else "past_key_values"


def build(given: ModelRun, w: Workload, device: str) -> HfModel:
    """Return the model of a workload, with random weights; InputError if the library cannot build
    it."""
    from transformers import AutoModelForCausalLM

    plan = check(given, w)
    make = partial(AutoModelForCausalLM.from_config, plan.config, dtype=TORCH_DTYPE[given.dtype])
    torch.manual_seed(given.seed)
    with torch.device(device):
        try:
            made = make(attn_implementation="sdpa")
        except ValueError:  # the model soft-caps its scores, which that function does not
            made = make(attn_implementation="eager")
    made.eval()
    _check_parameters(made, plan.stated)
    patched = _patch(made, plan)
    _sparsify(made, w)
    # on a CPU, torch copies the whole weight of a head whose input is a slice, as the last position
    # of a prompt is
    fresh = partial(torch.clone, memory_format=torch.contiguous_format)
    made.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (fresh(inputs[0]),))
    made.requires_grad_(False)
    return HfModel(made, patched)


def _check_parameters(made: Any, model: Model) -> None:
    found = sum(p.numel() for p in made.parameters())
    if found != model.parameters:
        raise InputError(
            f"Transformers builds {found:,} parameters; {model.parameters:,} are predicted"
        )


def _patch(made: Any, plan: Plan) -> str:
    """Change the layers that differ from those of the configuration; return the changes."""
    changed = Counter[str]()
    attention = 0
    for number, (new, old) in enumerate(zip(plan.model.layers, plan.stated.layers)):
        if new.windowless != old.windowless:
            changed.update(_change(made.model.layers[number], new.windowless, old.windowless))
        if changed and new.has("attention"):  # the cache counts attention layers
            made.model.layers[number].self_attn.layer_idx = attention
        attention += new.has("attention")
    return ", ".join(f"{what} in {count} layers" for what, count in changed.items())


def _change(layer: nn.Module, shape: Layer, usual: Layer) -> list[str]:
    out = []
    for part, name in (("attention", "attention"), ("mlp", "the MLP")):
        new = shape.of(part)
        old = usual.of(part)
        if isinstance(new, Attention | Mlp) and type(new) is type(old) and new != old:
            out += _change_sublayer(layer, new, f"other widths of {name}")
    attention = shape.of("attention")
    if isinstance(attention, Attention) and attention != usual.of("attention"):
        layer.self_attn.num_key_value_groups = attention.heads // attention.kv_heads
    missing = [name for part, name in _MODULES.items() if not shape.has(part)]
    for name in missing:
        layer.set_submodule(name, nn.Identity())
    if missing:
        layer.forward = partial(_without, layer, missing[0])
        out.append(f"no {'attention' if missing[0] == 'self_attn' else 'MLP'}")
    return list(dict.fromkeys(out))


_MODULES = {"attention": "self_attn", "mlp": "mlp"}
"""Part of a layer -> its module."""


def _change_sublayer(layer: nn.Module, new: Attention | Mlp, narrower: str) -> list[str]:
    """Replace the projections of a sublayer that have other sizes or are factors."""
    out = []
    hidden = _module(layer, "o" if isinstance(new, Attention) else "down").out_features
    for role, (n, k) in new.weights(hidden).items():
        old = _module(layer, role)
        rank = new.form(role).rank or 0
        if rank or (n, k) != (old.out_features, old.in_features):
            layer.set_submodule(PROJECTIONS[role], _projection(old, n, k, rank))
            out.append("low rank" if rank else narrower)
    return out


def _module(layer: nn.Module, role: str) -> Any:
    try:
        return layer.get_submodule(PROJECTIONS[role])
    except AttributeError:
        raise InputError(
            f"{type(layer).__name__} of Transformers has no {PROJECTIONS[role]} to patch"
        ) from None


def _without(layer: Any, missing: str, hidden_states: Any, **context: Any) -> Any:
    """The pass of a layer of Llama, without one of its sublayers."""
    if missing == "mlp":
        return (
            hidden_states
            + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **context)[0]
        )
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def _projection(old: Any, n: int, k: int, rank: int) -> nn.Module:
    def linear(rows: int, columns: int, bias: bool) -> nn.Linear:
        new = nn.Linear(columns, rows, bias=bias, device=old.weight.device, dtype=old.weight.dtype)
        nn.init.normal_(new.weight, std=1.0 / math.sqrt(columns))
        return new

    bias = old.bias is not None
    return (
        nn.Sequential(linear(rank, k, False), linear(n, rank, bias)) if rank else linear(n, k, bias)
    )


def _sparsify(made: Any, w: Workload) -> None:
    """Pack the projections that are 2:4 sparse; set scattered weights of unstructured projections
    to zero."""
    if not (w.kernel != Kernel.DENSE).any():
        return
    from calibration.runners.decoder.families import two_of_four

    shares = {}
    for i in ((w.layer >= 0) & (w.kind == Kind.GEMM)).nonzero()[0].tolist():
        shares[ROLES[w.role[i]]] = (Kernel(int(w.kernel[i])), float(w.density[i]))
    for layer in made.model.layers:
        for role, (kernel, density) in shares.items():
            old = _module(layer, role)
            if kernel == Kernel.SPARSE24:
                if old.weight.device.type != "cuda":
                    raise Unsupported(
                        f"2:4 needs sparse tensor cores; device {old.weight.device} has none"
                    )
                packed = sparse_weight(two_of_four(old.weight.data), searched=False)
                old.forward = partial(packed.linear, bias=old.bias)
            elif kernel == Kernel.UNSTRUCTURED:
                old.weight.data.mul_(torch.rand_like(old.weight) < density)


TOKENS = 4  # decode steps per sample of eager decode
MOST_COMPILED = 1024  # compiled passes of one process
MASKED = (
    "compiled Transformers masks its static cache, so torch attends without flash attention, in"
    " prefill over keys and values repeated for every query head; the prediction has flash"
    " attention"
)


class HfRunner(PairRunner):
    def __init__(self, device: Device, model: ModelRun) -> None:
        super().__init__(device, model)
        self.kept: dict[str, HfModel] = {}  # the dense and the last pruned model

    def check(self, case: Case) -> None:
        check(self.model, case.pruned)
        dense, pruned = (
            {*w.m[w.kind == Kind.GEMM], *zip(w.q_len[w.is_attention], w.kv_len[w.is_attention])}
            for w in (case.dense, case.pruned)
        )
        if not pruned <= dense:
            raise InputError(
                "its cache or its tokens are fewer, but Transformers would run those of the dense"
                " model"
            )

    def starts(self, case: Case) -> bool:
        return case.prune not in self.kept

    def prepare(self, case: Case) -> None:
        self.kept["dense"] = build(self.model, case.dense, self.device.name)

    def timed(self, case: Case, end: float) -> Row:
        if case.prune not in self.kept:
            start = time.perf_counter()
            self.kept = {"dense": self.kept["dense"]}  # memory may hold two large models, not three
            self.kept[case.prune] = build(self.model, case.pruned, self.device.name)
            self.start_s = time.perf_counter() - start
        dense = self.kept["dense"]
        pruned = self.kept[case.prune]
        compiled = self.model.engine == "compile"
        sampler, untimed = (compiled_sampler, UNTIMED) if compiled else (eager_sampler, 1)
        samplers = sampler(dense, case), sampler(pruned, case)
        with torch.inference_mode():
            times = alternate(*samplers, self.limit_s(end), self.device, untimed)
        return {
            "runtime": "compiled" if compiled else "eager",
            "patched": pruned.patched,
            **times,
            "reason": MASKED if compiled else "",
        }

    def begin(self, case: Case) -> None:
        self.prepare(case)

    def observe(self, case: Case, seconds: float) -> Observation:
        # the profiler of torch 2.13 prints two lines per use, at every level below this one
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        sample = eager_sampler(self.kept["dense"], case)
        passes = 1 if case.phase == "prefill" else TOKENS + 1
        with torch.inference_mode():
            times = repeated(lambda: sample(1), seconds)
            with torch.profiler.profile() as profile:
                sample(1)
        found = kernel_seconds(profile.key_averages(), self.device.name.startswith("cuda"))
        kernels = {name: seconds / passes for name, seconds in found.items()}
        return Observation(*times, kernels, metadata.version("transformers"))


def kernel_seconds(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Return the time of each kernel of a profile, s. On a GPU, the times of operators and of
    annotations contain those of the kernels that they launch, so only kernels count."""
    if not on_gpu:
        return {event.key: 1e-6 * float(event.self_cpu_time_total) for event in events}
    return {
        event.key: 1e-6 * float(event.self_device_time_total)
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    }


def _prompt(model: Any, case: Case) -> tuple[Any, Callable[[], Any]]:
    """Return random tokens, and a function that waits for the device."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(
        vocabulary, (case.batch, case.seq), generator=torch.Generator().manual_seed(0)
    )
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    return tokens.to(model.device), wait


class _Stamps:
    """A logits processor that notes the time after every token of ``generate``."""

    def __init__(self, synchronize: Callable[[], Any], tokens: int) -> None:
        self.synchronize = synchronize
        self.tokens = tokens
        self.at_s = list[float]()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # between the first and the last token the host may run ahead
        if len(self.at_s) in (0, self.tokens):
            self.synchronize()
        self.at_s.append(time.perf_counter())
        return scores


def eager_sampler(built: HfModel, case: Case) -> Sampler:
    from transformers import DynamicCache, LogitsProcessorList

    model = built.model
    tokens, wait = _prompt(model, case)
    if case.phase == "prefill":
        return looped(lambda: model(tokens, use_cache=True, logits_to_keep=1), wait)
    if case.phase == "generate":
        many = case.dense.meta.new_tokens + 1  # the prefill makes the first token
        return looped(lambda: model.generate(tokens, max_new_tokens=many, do_sample=False), wait)
    cache = DynamicCache(config=model.config)
    model(tokens, use_cache=True, logits_to_keep=1, **{built.cache_name: cache})
    longer = torch.cat([tokens, tokens[:, :1]], dim=1)

    def one() -> float:
        stamps = _Stamps(wait, TOKENS)
        given = {built.cache_name: cache, "logits_processor": LogitsProcessorList([stamps])}
        model.generate(longer, max_new_tokens=TOKENS + 1, do_sample=False, **given)
        _crop(cache, cache.get_seq_length() - case.seq)
        return (stamps.at_s[-1] - stamps.at_s[0]) / TOKENS

    return lambda loops: sum(one() for _ in range(loops)) / loops


def _crop(cache: Any, tokens: int) -> None:
    """Remove the last tokens from the keys and values. States of recurrences stay, because their
    values do not change the time of a step; the library does not crop layers with such states."""
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        if not hasattr(layer, "conv_states"):
            layer.crop(-tokens)
        elif isinstance(layer, DynamicLayer):
            DynamicLayer.crop(layer, -tokens)


def _rewind(cache: Any, length: int) -> None:
    """Set the length of a static cache in two launches: its layers have no ``crop`` before
    Transformers 5.24. Before 5.5, the keys of the first layer that are not zero are its length."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    lengths = [
        layer.cumulative_length
        for layer in layers
        if torch.is_tensor(getattr(layer, "cumulative_length", 0))
    ]
    if lengths:
        torch._foreach_zero_(lengths)
        torch._foreach_add_(lengths, length)
    else:
        layers[0].keys[:, :, length:].zero_()
    for layer in layers:
        # counters of layers with a window
        for name in ("cumulative_length", "cumulative_length_int"):
            if isinstance(getattr(layer, name, None), int):
                setattr(layer, name, length)


def compiled_sampler(built: HfModel, case: Case) -> Sampler:
    from transformers import StaticCache

    # each model and phase is compiled; beyond these limits torch would run passes eagerly
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(
            torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), MOST_COMPILED)
        )
    model = built.model
    tokens, wait = _prompt(model, case)
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    compiled = torch.compile(model.forward, dynamic=False, fullgraph=True, mode=mode)
    cache = StaticCache(
        config=model.config, max_cache_len=case.seq + max(case.dense.meta.new_tokens, 1)
    )
    given = {"use_cache": True, "logits_to_keep": 1, built.cache_name: cache}
    model(tokens, **given)  # allocates the cache, which a compiled pass must find
    last = tokens[:, -1:].clone()
    if case.phase == "decode":

        def step() -> None:
            compiled(last, **given)
            _rewind(cache, case.seq)

        return looped(step, wait)
    _rewind(cache, 0)

    def request() -> None:
        logits = compiled(tokens, **given).logits
        for _ in range(case.dense.meta.new_tokens):
            logits = compiled(logits[:, -1].argmax(-1, keepdim=True), **given).logits
        _rewind(cache, 0)

    return looped(request, wait)
