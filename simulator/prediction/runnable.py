"""Answer "Will it run?" for a pruned model in a stock engine: can the engine load it, are its
widths aligned, can the devices divide it, and has the engine kernels for it.

Use :func:`runnable` for a pruning, :func:`will_run` for workloads. Whether an engine loads a model
follows from the features of its checkpoint (:func:`loading`), which are read from the model;
engines state in their YAML files which features they load (:mod:`simulator.engines.engine`).
:func:`config_of` writes a ``config.json``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.codes import DTYPES, Kernel, Kind
from simulator.display import Displayed, with_and
from simulator.engines.engine import FEATURES, Engine, Loading, load_engine
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.checkpoint import NAMED
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model, indivisible, shard, undivided
from simulator.models.sublayers import Attention, Experts, LatentAttention, Linear, Mlp, Sublayer
from simulator.models.write import config_content, content_of, plain_content
from simulator.operators.base import ELEMENT_BYTES
from simulator.operators.gemm import aligned_elements, gemm_kernel
from simulator.passes import by_formats, refusal
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import computed_on
from simulator.prediction.result import Result, Results
from simulator.prediction.table import speedup
from simulator.prediction.wording import GAIN
from simulator.pruning import prune_model, with_model
from simulator.request import Request
from simulator.units import ratio
from simulator.workload import Workload, WorkloadBatch

# numbers of devices for which Runnable.tensor_parallel is evaluated
DEGREES: tuple[int, ...] = (1, 2, 4, 8, 16)
_DIVIDED = {
    "tensor": ("MLP width", "query width", "expert width"),
    "expert": ("MLP width", "query width"),
}
"""Widths that devices share."""


DIVIDING = frozenset(("llama", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "aria_text"))
"""Architectures whose configuration in Transformers from 5.5 requires heads that divide the hidden
size, also if head_dim is stated (``validate_architecture``; tried in vLLM 0.32 with Transformers
5.19, and in Transformers 5.24)."""


ZEROS = "dense kernels compute its scattered zeros, so they save no time"
"""Why kernels do not use a pruning although they run it."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Runnable(Displayed):
    engine: str
    devices: int
    # whether the engine runs the model, at whatever speed; None if its file does not state it
    works: bool | None
    loadable: bool | None  # whether it loads the checkpoint without changes to its code
    load_reason: str  # how it loads the checkpoint, or why not
    aligned: bool  # whether every width is a multiple of what fast kernels need, on each device
    # unaligned dimension with the most weights, such as "MLP width"; "" if all are aligned
    unaligned_dimension: str
    unaligned_width: int  # width in the whole model; 0 if all are aligned
    aligned_width: int  # the nearest larger aligned width
    # time over the time with all widths aligned; None without a device, or if all widths
    aligned_gain: float | None
    # are multiples of 16 bytes (the gain of other multiples is not modelled)
    aligned_gain_lower: float | None
    aligned_gain_upper: float | None
    divisible: bool  # whether the devices can divide the model equally
    divisible_reason: str
    # numbers of DEGREES among which tensor parallel can divide the model
    tensor_parallel: tuple[int, ...]
    # whether the engine has kernels that use the pruning; unstructured zeros have none
    kernels: bool
    kernels_reason: str

    @property
    def sentence(self) -> str:
        """The answer for a stock engine: yes or no, then why."""
        stops = (
            [f"stock {self.engine} does not load {self.load_reason}"]
            if self.loadable is False
            else []
        )
        stops += [f"it has {self.divisible_reason}"] if not self.divisible else []
        slow = [] if self.aligned else [unaligned(self)]
        if not self.kernels:
            (slow if self.kernels_reason == ZEROS else stops).append(self.kernels_reason)
        if stops:
            return (
                ". ".join(
                    [f"No: {'; '.join(stops)}", *(text[0].upper() + text[1:] for text in slow)]
                )
                + "."
            )
        if self.loadable is None:
            return f"Not known: {self.load_reason}."
        return (
            f"Yes, but {'; '.join(slow)}."
            if slow
            else f"Yes: stock {self.engine} loads it {self.load_reason}."
        )

    def _title(self) -> str:
        return self.sentence

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"runs": self.sentence}


def runs_clause(r: Runnable) -> str:
    """Return the answer as the last clause of a sentence about the model; "" if it is not known."""
    return runs_text(r.engine, r.works)


def runs_text(engine: str, works: bool | None) -> str:
    return "" if works is None else f"; stock {engine} {'runs' if works else 'does not run'} it"


def unaligned(r: Runnable) -> str:
    """Return which width is not aligned, and the gain of the nearest aligned width."""
    over = f" over {r.devices} devices" if r.devices > 1 else ""
    text = f"{r.unaligned_dimension} {r.unaligned_width:,}{over} is not aligned"
    if r.aligned_gain is None:
        return f"{text}; the nearest aligned width is {r.aligned_width:,}"
    ends = f"({ratio(r.aligned_gain_lower or 0.0)}-{ratio(r.aligned_gain_upper or 0.0)})"
    faster = f"{ratio(r.aligned_gain)}x faster {ends}" if r.aligned_gain >= GAIN else "no faster"
    return f"{text}; {r.aligned_width:,} is {faster}"


def runnable(request: Request, pruning: Pruning, hw: HardwareProfile | None = None) -> Runnable:
    """Return whether the stock engine of a request runs a pruning of its model; the gain of an
    aligned width is predicted on ``hw``. Loading and divisibility are those of the whole model;
    alignment and kernels those of its share on each device. A model that the devices cannot divide
    is judged on one device."""
    if hw is not None:
        models = [] if pruning.model is None else [pruning.model]
        request = computed_on(request, hw, models)
        pruning = pruning.computed(request, hw)
    alone = replace(request, devices=1)
    whole = pruning.apply(lower(alone), alone)
    # a pruned model gets a new config.json; an existing model keeps its own
    dense = load_model(request.model)
    config = pruning.model or replace(dense, mismatch="")
    if request.devices == 1:
        return _stated(will_run(whole, hw, config=config, dense=dense), request, pruning, whole)
    devices, parallel = request.devices, request.parallel
    reason, share = indivisible(whole.meta.config, devices, parallel), whole
    if not reason:
        share = pruning.apply(lower(request), request)
    elif size := undivided(whole.meta.config.layers, devices, parallel):
        reason += f"; {size.nearest(devices)}"
    found = will_run(whole, hw, config=config, dense=dense, share=share, divisible_reason=reason)
    return _stated(found, request, pruning, whole)


def _stated(found: Runnable, request: Request, pruning: Pruning, whole: Workload) -> Runnable:
    """Return the answer for a new ``config.json``: No if the keys of its architecture cannot state
    the pruned shapes. For :data:`NAMED` architectures, the engines' files state this."""
    dense, model = load_model(request.model), whole.meta.config
    new = pruning.model is None and model.layers != dense.layers
    content = content_of(request.model, dense) if found.loadable and new else {}
    if not content or dense.architecture in NAMED:
        return found
    try:
        plain_content(content, dense, model)
    except InputError as error:
        reason = f"its shapes: {str(error).split(': ', 1)[1]}"
        return replace(found, loadable=False, works=False, load_reason=reason)
    return found


def runnables(found: Results, hardware: Sequence[HardwareProfile] = ()) -> list[Runnable]:
    """Return the answer for each result of a table; with ``hardware``, the gain of an aligned width
    too."""
    profiles = {hw.label: hw for hw in hardware}
    known: dict[tuple[str, int, int, int, str], Runnable] = {}
    out = []
    for r, one, index in zip(found, found.asked, found.pruning.tolist()):
        pruning = found.prunings[index]
        hw = profiles.get(r.hardware)
        # within its budget a pruning removes nothing
        key = (
            r.engine,
            index,
            r.devices,
            r.seq if pruning.sets_sparsity else 0,
            hw.architecture if hw else "",
        )
        if key not in known:
            known[key] = runnable(one, pruning, hw)
        answer = known[key]
        out.append(answer if answer.aligned or hw is None else runnable(one, pruning, hw))
    return out


def will_run(
    pruned: Workload,
    hw: HardwareProfile | None = None,
    *,
    config: Model | None = None,
    dense: Model | None = None,
    share: Workload | None = None,
    divisible_reason: str = "",
) -> Runnable:
    """Return whether the stock engine of a workload on one device runs its model. ``config`` is the
    configuration of an existing checkpoint (default: that of the dense model), ``dense`` the model
    before pruning, ``share`` the share of each of several devices, ``divisible_reason`` why they
    cannot divide the model."""
    if pruned.meta.devices > 1 and pruned.meta.parallel != "pipeline":
        raise InputError(
            f"pruned: expected a model on one device, got a share of {pruned.meta.devices} devices"
        )
    own = pruned if share is None else share
    model, meta = pruned.meta.config, own.meta
    engine = load_engine(meta.engine)
    loadable, load_reason = loading(pruned, engine, config or model, dense)
    if loadable is not False and config is not None and (reason := as_it_is(config, model, engine)):
        loadable, load_reason = False, reason
    part = shard(model, meta.devices, meta.parallel if meta.devices > 1 else "tensor")
    widths = widths_of(part)
    unit, sixteen = _units(own, engine)
    missing = _kernels(own, engine, hw, widths)
    if loadable and not model.layers:
        loadable, load_reason = False, "a decoder without layers"
    elif loadable and (
        how := [engine.dynamic[family].how for family in _dynamic(own) if family in engine.dynamic]
    ):
        load_reason = f"with {'; '.join(how)}"
    zeros = ZEROS if (own.kernel == Kernel.UNSTRUCTURED).any() else ""
    odd = [width for width in widths if width.size % unit]
    worst = max(odd, key=lambda width: width.weights, default=None)
    gain = None
    # the gain of multiples other than 16 bytes, and of heads, is not modelled
    modelled = any(width.size % sixteen and width.name != QUERIES for width in odd)
    if modelled and not missing and hw is not None:
        gain = speedup(own, with_model(own, aligned_up(model, unit, meta.devices)), hw)
    shared = worst is not None and worst.name in _DIVIDED.get(meta.parallel, ())
    times = meta.devices if shared else 1
    size = 0 if worst is None else worst.size
    return Runnable(
        engine=engine.name,
        devices=own.meta.devices,
        works=False if divisible_reason or missing else loadable,
        loadable=loadable,
        load_reason=load_reason,
        aligned=not odd,
        unaligned_dimension="" if worst is None else worst.name,
        unaligned_width=size * times,
        aligned_width=-(-size // unit) * unit * times,
        aligned_gain=None if gain is None else gain.speedup,
        aligned_gain_lower=None if gain is None else gain.lower,
        aligned_gain_upper=None if gain is None else gain.upper,
        divisible=not divisible_reason,
        divisible_reason=divisible_reason,
        tensor_parallel=tuple(n for n in DEGREES if not indivisible(model, n, "tensor")),
        kernels=not (missing or zeros),
        kernels_reason=missing or zeros,
    )


@dataclass(frozen=True)
class Width:
    """A width of the products of a device, with the number of their weights."""

    name: str
    size: int
    weights: float


QUERIES = "query width"
"""Heads times their features, which is not rounded."""

_WIDTHS = {
    "down": "MLP width",
    "o": QUERIES,
    **dict.fromkeys(("q", "k", "v", "qkv", "gate", "up", "gate_up"), "hidden size"),
}
"""Role of a projection -> the width of its inputs."""


@lru_cache(maxsize=256)
def widths_of(model: Model) -> tuple[Width, ...]:
    """Return the different widths of a model, those with the same name and size together."""
    weights: Counter[tuple[str, int]] = Counter()
    for run in model.runs:
        for sublayer in run.layer.sublayers:
            for role, (n, k) in sublayer.weights(model.hidden).items():
                count = run.length * n * k
                if role in _WIDTHS:
                    weights[_WIDTHS[role], k] += count
                if (rank := sublayer.form(role).rank) is not None:
                    weights["rank", rank] += run.length * rank * k
            if isinstance(sublayer, Experts):
                weights["expert width", sublayer.inner] += (
                    run.length * sublayer.inner * model.hidden
                )
    return tuple(Width(name, size, float(count)) for (name, size), count in weights.items())


def aligned_up(model: Model, unit: int, devices: int = 1) -> Model:
    """Return the model with its widths on each of several devices rounded up to multiples of
    ``unit``, except :data:`QUERIES`."""

    def up(width: int, devices: int = 1) -> int:
        return -(-width // (unit * devices)) * unit * devices

    def wider(sublayer: Sublayer) -> Sublayer:
        forms = tuple(
            (role, form if form.rank is None else replace(form, rank=up(form.rank)))
            for role, form in sublayer.forms
        )
        sublayer = replace(sublayer, forms=forms)
        if isinstance(sublayer, Mlp):
            return replace(sublayer, inner=up(sublayer.inner, devices))
        if isinstance(sublayer, Experts):
            shared = up(sublayer.shared_inner, devices)
            return replace(sublayer, inner=up(sublayer.inner, devices), shared_inner=shared)
        return sublayer

    wide = model.each_layer(lambda layer: layer.each(wider))
    return replace(wide, hidden=up(model.hidden))


def _units(w: Workload, engine: Engine) -> tuple[int, int]:
    """Return the number of which the engine's kernels need a multiple, and the elements in 16
    bytes."""
    dtype = w.meta.dtype
    weight = w.meta.weight_dtype or dtype
    sixteen = aligned_elements(ELEMENT_BYTES[dtype])
    # formats of weights alone have kernels of their own
    alone = weight != dtype and weight in engine.widths
    return math.lcm(sixteen, engine.widths[weight].multiple if alone else 1), sixteen


def _dynamic(w: Workload) -> list[str]:
    found = (one.step[0].family for one in w.meta.applied if one.step and one.realised > 0)
    return list(dict.fromkeys(family.name for family in found if family.dynamic))


def _kernels(
    w: Workload, engine: Engine, hw: HardwareProfile | None, widths: Sequence[Width]
) -> str:
    """Return which kernels an engine or a device lacks for a workload, or ""."""
    for family in _dynamic(w) if w.meta.engine else ():
        if family not in engine.dynamic:
            return f"stock {engine.name} has no kernels for {family}"
        own = engine.dynamic[family]
        if hw is not None and own.on and hw.architecture not in own.on:
            return (
                f"stock {engine.name} has kernels for {family} only on {with_and(own.on)}"
                f" ({own.how})"
            )
    if (w.kernel == Kernel.SPMV).any():
        return f"stock {engine.name} has no kernels that skip scattered zeros (spmv)"
    if reason := refusal(WorkloadBatch.of([w]), hw.architecture if hw else ""):
        return reason
    for name, width in engine.widths.items():
        stored = (w.weight_dtype == DTYPES.index(name)).any()
        if width.required and stored and any(one.size % width.multiple for one in widths):
            return (
                f"{engine.name} needs multiples of {width.multiple} per device for {name} weights"
            )
    if hw is None:
        return ""
    try:
        for rows, dtype, weight in by_formats(w, Kind.GEMM):
            for kernel in np.unique(w.kernel[rows]).tolist():
                gemm_kernel(hw, dtype, weight, Kernel(kernel))
    except InputError as error:
        return str(error)
    return ""


_STATED = (
    *("heads", "sublayers", "layer_inner", "layer_heads", "layer_kv_heads", "layer_experts"),
)
"""Features that the usual keys of some model types state."""


def loading(
    w: Workload, engine: Engine, config: Model | None, dense: Model | None = None
) -> tuple[bool | None, str]:
    """Return whether the stock engine loads the checkpoint of a model (None: its file does not
    state it), and how, or why not. ``config`` is the configuration of the checkpoint, or of the
    ``dense`` model."""
    custom = engine.loads.get("custom_code")
    if config is not None and (absent := _without_class(engine, config.architecture)):
        coded = config.custom_code and custom is not None and custom.value
        return (True, custom.how) if custom and coded else absent
    # pruned in Python, without a configuration
    made = dense is None and config is w.meta.config and w.meta.applied
    alike = config and dense and config.architecture == dense.architecture
    own = frozenset[str]() if made else _stated_features(dense if alike else config)
    present = [
        name for name in features(w, config.architecture if config else "") if name not in own
    ]
    how = {name: engine.loads[name].how for name in present if name in engine.loads}
    missing: dict[str, list[str]] = {}  # reason -> features
    for name in how:
        if reason := _refusal(engine.loads[name], name, w, config):
            missing.setdefault(reason, []).append(FEATURES[name])
    if (
        config is not None
        and config.custom_code
        and custom is not None
        and (missing or config.mismatch)
    ):
        if custom.value:
            return True, custom.how
        missing.setdefault(custom.how, []).append(
            f"{FEATURES['custom_code']} ({config.custom_code})"
        )
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in missing.items()]
    if config is not None and config.mismatch:
        fix = "" if missing else "; write its shapes into config.json"
        reasons.insert(0, f"tensors that differ from config.json ({config.mismatch}){fix}")
    if reasons:
        return False, "; ".join(reasons)
    if unknown := [FEATURES[name] for name in present if name not in how]:
        return (
            None,
            (
                f"the file of engine {engine.name} does not state whether it loads"
                f" {', '.join(unknown)}"
            ),
        )
    special = dict.fromkeys(text for name, text in how.items() if name != "uniform")
    return True, " and ".join(special) or how["uniform"]


def _without_class(engine: Engine, architecture: str) -> tuple[bool | None, str] | None:
    """Return the answer for a model type that an engine has no class for; None if it has one."""
    usual = engine.loads.get("uniform")
    if usual is None or architecture not in usual.missing:
        return None
    if usual.backend:
        return (
            None,
            f"stock {engine.name} has no class for model_type {architecture}; {usual.backend}",
        )
    return False, f"model_type {architecture}: it has no class for it"


def _stated_features(config: Model | None) -> frozenset[str]:
    """Return the features that a configuration states in the usual keys of its model type, which
    its class reads (hybrids)."""
    if config is None or config.layer_key or config.mismatch:
        return frozenset()
    return frozenset(name for name in model_features(config) if name in _STATED)


def as_it_is(config: Model, model: Model, engine: Engine) -> str:
    """Return which keys of the ``config.json`` of an existing model must change before an engine
    loads its layers, or ""."""
    custom = engine.loads.get("custom_code")
    changed = (config.hidden, config.layers) != (model.hidden, model.layers)
    if changed or (config.custom_code and custom and custom.value):
        return ""  # the model gets a new config.json, or its own code reads it
    alike = config.architecture in ("llama", "mistral", "ministral")
    fix = (
        "; change model_type to nemotron-nas, and state the layers as DeciLM does" if alike else ""
    )
    if config.layer_key == "per_layer_config":
        return f"this config.json as it is: no class of an engine applies per_layer_config{fix}"
    if config.layer_key == "block_configs" and config.architecture != "nemotron-nas":
        return f"this config.json as it is: its class ignores block_configs{fix}"
    heads = (s.heads for layer in model.layers if isinstance(s := layer.of("attention"), Attention))
    if config.architecture in DIVIDING and any(model.hidden % number for number in heads):
        fix = "; change model_type to mistral and sliding_window to null" if alike else ""
        return (
            "this config.json as it is: its class refuses heads that do not divide the hidden"
            f" size{fix}"
        )
    return ""


def features(w: Workload, architecture: str = "") -> Iterator[str]:
    """Yield the features (:data:`simulator.engines.engine.FEATURES`) of the checkpoint of a model
    on one device."""
    yield from model_features(w.meta.config, architecture)
    if (w.is_role("router") & w.overhead).any():
        yield "routers"


def model_features(model: Model, architecture: str = "") -> Iterator[str]:
    """Yield the features of a model that its layers show."""
    layers = tuple(dict.fromkeys(layer.windowless for layer in model.layers))
    sublayers = tuple(dict.fromkeys(s for layer in layers for s in layer.sublayers))
    grouped = [s for s in sublayers if isinstance(s, Attention)]
    attending = [s for s in sublayers if isinstance(s, Attention | LatentAttention)]
    mlps = [s for s in sublayers if isinstance(s, Mlp)]
    routed = [s for s in sublayers if isinstance(s, Experts)]
    yield "uniform"
    if any(s.heads * s.head_dim != model.hidden for s in grouped):
        yield "heads"
    if architecture in DIVIDING and any(model.hidden % s.heads for s in grouped):
        yield "odd_heads"
    if any(s.heads % s.kv_heads for s in grouped):
        yield "groups"
    if any(layer.has("attention") != layer.has("mlp") for layer in layers):
        yield "sublayers"
    if _differ(s.inner for s in mlps) or _differ(s.shared_inner for s in routed):
        yield "layer_inner"
    if _differ(s.heads for s in attending):
        yield "layer_heads"
    if _differ(s.kv_heads for s in grouped):
        yield "layer_kv_heads"
    if _differ((s.experts, s.inner) for s in routed):
        yield "layer_experts"
    if any(s.choices for s in routed):
        yield "expert_choice"
    if any(isinstance(s, Linear) for s in sublayers):
        yield "linear"
    if any(form.rank is not None for s in sublayers for _, form in s.forms):
        yield "low_rank"
    if any(s.rotates for s in sublayers):
        yield "residual_projections"


def _differ(values: Iterable[Any]) -> bool:
    return len(set(values)) > 1


def config_of(source: str, r: Result) -> dict[str, Any]:
    """Return the content of the ``config.json`` of a predicted pruned model; InputError if it has
    no such file."""
    dense, content = load_model(source), content_of(source)
    if not content:
        raise InputError(
            f"{dense.name}: has no config.json to start from; expected a name or a file"
        )
    return config_content(content, dense, prune_model(dense, r.prune))


def _refusal(found: Loading, feature: str, w: Workload, config: Model | None) -> str:
    """Return why an engine does not load a feature of a model, or ""."""
    if not found.value:
        return found.how
    if (
        config is not None
        and found.model_types
        and (kind := _kind(config)) not in found.model_types
    ):
        only = (
            f"only for model_type {' and '.join(found.model_types)}, "
            if len(found.model_types) <= 3
            else ""
        )
        return f"{only}not for {kind}"
    inner = w.meta.config.sizes("inner width")
    if feature == "layer_inner" and (odd := [n for n in inner if n % found.multiple]):
        return f"it describes multiples of {found.multiple}, not {int(odd[0]):,}"
    return ""


def _kind(config: Model) -> str:
    """Return the model type whose code runs a model: Mistral without windows has the tensors and
    operators of Llama."""
    plain_mistral = config.architecture == "mistral" and not any(config.windows)
    return "llama" if plain_mistral else config.architecture
