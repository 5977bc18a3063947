"""Answer "Will it run?" for a pruned model in a stock engine: can the engine load it, are its
widths aligned, can the devices divide it, and has the engine kernels for it.

Use :func:`runnable` for a pruning, :func:`will_run` for workloads. Whether an engine loads a model
follows from the features of its checkpoint (:func:`loading`), which are read from its workload on
one device; engines state in their YAML files which features they load
(:mod:`simulator.engines.engine`). :func:`config_of` writes a ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.arrays import Array, BoolArray
from simulator.codes import DTYPES, Kernel, Kind, Part
from simulator.display import Displayed, with_and
from simulator.engines.engine import FEATURES, Engine, Loading, load_engine
from simulator.errors import InputError
from simulator.hardware.profile import HardwareProfile
from simulator.models.changes import changed_keys, content_of
from simulator.models.config import Block, ModelConfig, indivisible
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.operators.base import ELEMENT_BYTES
from simulator.operators.gemm import aligned_elements, gemm_kernel
from simulator.passes import by_formats, refusal
from simulator.prediction.prunings import Pruning
from simulator.prediction.result import Result, Results
from simulator.prediction.sentences import ZEROS, will_it_run
from simulator.prediction.table import speedup
from simulator.pruning import FAMILIES, prune
from simulator.pruning._rows import FIXED, aligned_up, covering, layer_count, widths
from simulator.request import Request
from simulator.workload import Workload, WorkloadBatch

# numbers of devices for which Runnable.tensor_parallel is evaluated
DEGREES: tuple[int, ...] = (1, 2, 4, 8, 16)
_DIVIDED = {
    "tensor": ("MLP width", "query width", "expert width"),
    "expert": ("MLP width", "query width"),
}
"""Widths that devices share."""


DIVIDING = frozenset(("llama", "gemma2", "gemma3", "gemma3_text"))
"""Architectures whose configuration in Transformers from 5.5 requires heads that divide the hidden
size, also if head_dim is stated (``validate_architecture``; tried in vLLM 0.32 with Transformers
5.19, and in Transformers 5.24)."""


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
        return will_it_run(self)

    def _title(self) -> str:
        return self.sentence

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"runs": will_it_run(self)}


def runnable(request: Request, pruning: Pruning, hw: HardwareProfile | None = None) -> Runnable:
    """Return whether the stock engine of a request runs a pruning of its model; the gain of an
    aligned width is predicted on ``hw``. Loading and divisibility are those of the whole model;
    alignment and kernels those of its share on each device. A model that the devices cannot divide
    is judged on one device."""
    alone = replace(request, devices=1)
    whole = pruning.apply(lower(alone), alone)
    # a pruned model gets a new config.json; an existing model keeps its own
    config = pruning.model or replace(load_model(request.model), mismatch="")
    if request.devices == 1:
        return will_run(whole, hw, config=config)
    reason = _indivisible(whole, request.devices, request.parallel)
    try:
        share = pruning.apply(lower(request), request)
        reason += "; the prediction rounds per device" if reason else ""
    except InputError:
        if not reason:
            raise
        share = whole
    return will_run(whole, hw, config=config, share=share, divisible_reason=reason)


def runnables(found: Results, hardware: Sequence[HardwareProfile] = ()) -> list[Runnable]:
    """Return the answer for each result of a table; with ``hardware``, the gain of an aligned width
    too."""
    requests = {(load_engine(r.engine).name, r.phase, r.batch, r.seq): r for r in found.requests}
    profiles = {hw.label: hw for hw in hardware}
    known: dict[tuple[str, int, int, str], Runnable] = {}
    out = []
    for r, index in zip(found, found.pruning.tolist()):
        pruning = found.prunings[index]
        one = requests[r.engine, r.phase, r.batch, r.seq]
        hw = profiles.get(r.hardware)
        # within its budget a pruning removes nothing
        key = (r.engine, index, r.seq if pruning.budgeted else 0, hw.architecture if hw else "")
        if key not in known:
            known[key] = runnable(one, pruning, hw)
        answer = known[key]
        out.append(answer if answer.aligned or hw is None else runnable(one, pruning, hw))
    return out


def will_run(
    pruned: Workload,
    hw: HardwareProfile | None = None,
    *,
    config: ModelConfig | None = None,
    share: Workload | None = None,
    divisible_reason: str = "",
) -> Runnable:
    """Return whether the stock engine of a workload on one device runs its model. ``config`` is the
    configuration of an existing checkpoint (default: that of the dense model), ``share`` the share
    of each of several devices, ``divisible_reason`` why they cannot divide the model."""
    if pruned.meta.devices > 1 and pruned.meta.parallel != "pipeline":
        raise InputError(
            f"pruned: expected a model on one device, got a share of {pruned.meta.devices} devices"
        )
    own, parts = pruned if share is None else share, blocks(pruned)
    engine = load_engine(own.meta.engine)
    loadable, load_reason = loading(pruned, engine, config or pruned.meta.config)
    missing = _kernels(own, engine, hw)
    if loadable and not layer_count(pruned):
        loadable, load_reason = False, "a decoder without layers"
    elif loadable and (
        how := [engine.dynamic[family].how for family in _dynamic(own) if family in engine.dynamic]
    ):
        load_reason = f"with {'; '.join(how)}"
    zeros = ZEROS if (own.kernel == Kernel.UNSTRUCTURED).any() else ""
    sixteen, unit = _units(own, engine)
    odd = {name: width for name, width in widths(own).items() if (width % unit > 0).any()}
    modelled = {name for name, width in odd.items() if (width % sixteen > 0).any()} - {*FIXED}
    dimension, width, multiple = _worst(own, odd, unit)
    gain = None
    if modelled and not missing and hw is not None:
        gain = speedup(own, aligned_up(own, unit), hw)
    times = own.meta.devices if dimension in _DIVIDED.get(own.meta.parallel, ()) else 1
    return Runnable(
        engine=engine.name,
        devices=own.meta.devices,
        works=False if divisible_reason or missing else loadable,
        loadable=loadable,
        load_reason=load_reason,
        aligned=not odd,
        unaligned_dimension=dimension,
        unaligned_width=width * times,
        aligned_width=-(-width // multiple) * multiple * times,
        aligned_gain=None if gain is None else gain.speedup,
        aligned_gain_lower=None if gain is None else gain.lower,
        aligned_gain_upper=None if gain is None else gain.upper,
        divisible=not divisible_reason,
        divisible_reason=divisible_reason,
        tensor_parallel=tuple(
            n for n in DEGREES if not any(indivisible(block, n, "tensor") for block in parts)
        ),
        kernels=not (missing or zeros),
        kernels_reason=missing or zeros,
    )


def _indivisible(whole: Workload, devices: int, parallel: str) -> str:
    """Return why devices cannot divide a model, or ""."""
    if parallel == "pipeline":
        layers = layer_count(whole)
        return (
            f"{layers} layers; a pipeline of {devices} devices needs {devices}"
            if layers < devices
            else ""
        )
    return next(
        filter(None, (indivisible(block, devices, parallel) for block in blocks(whole))), ""
    )


def _units(w: Workload, engine: Engine) -> tuple[Array, Array]:
    """Return the elements in 16 bytes of each row, and the number of which the engine's kernels
    need a multiple."""
    sixteen = np.array([aligned_elements(ELEMENT_BYTES[name]) for name in DTYPES])[w.dtype]
    own = np.array(
        [engine.widths[name].multiple if name in engine.widths else 1 for name in DTYPES]
    )
    # formats of weights alone
    own_kernels = np.where(w.weight_dtype == w.dtype, 1, own[w.weight_dtype])
    return sixteen, np.lcm(sixteen, own_kernels)


def _worst(w: Workload, odd: dict[str, Array], unit: Array) -> tuple[str, int, int]:
    """Return the unaligned dimension with the most weights, its width and the number it should be a
    multiple of."""
    weights, best = w.n * w.k * w.count, ("", 0, 1)
    most = 0.0
    for name, width in odd.items():
        rows = width % unit > 0
        if (total := float(weights[rows].sum())) > most:
            row = np.flatnonzero(rows)[np.argmax(weights[rows])]
            best, most = (name, int(width[row]), int(unit[row])), total
    return best


def _dynamic(w: Workload) -> list[str]:
    found = [
        family for step in w.meta.applied if step.realised > 0 for family in step.family.split("+")
    ]
    return [
        family for family in dict.fromkeys(found) if family in FAMILIES and FAMILIES[family].dynamic
    ]


def _kernels(w: Workload, engine: Engine, hw: HardwareProfile | None) -> str:
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
        rows = (w.weight_dtype == DTYPES.index(name)) & width.required
        if (odd := [found[rows] % width.multiple for found in widths(w).values()]) and any(
            x.any() for x in odd
        ):
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


def loading(w: Workload, engine: Engine, config: ModelConfig | None) -> tuple[bool | None, str]:
    """Return whether the stock engine loads the checkpoint of a model (None: its file does not
    state it), and how, or why not. ``config`` is the configuration of the checkpoint, or of the
    dense model."""
    present = tuple(features(w, config.architecture if config else ""))
    how = {name: engine.loads[name].how for name in present if name in engine.loads}
    missing: dict[str, list[str]] = {}  # reason -> features
    for name in how:
        if reason := _refusal(engine.loads[name], name, w, config):
            missing.setdefault(reason, []).append(FEATURES[name])
    custom = engine.loads.get("custom_code")
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


def features(w: Workload, architecture: str = "") -> Iterator[str]:
    """Yield the features (:data:`simulator.engines.engine.FEATURES`) of the checkpoint of a model
    on one device."""
    yield "uniform"
    attention, down, routed = w.is_attention, widths(w)["MLP width"], w.kind == Kind.EXPERTS
    linear, inside = w.is_role("linear"), w.layer >= 0
    hidden, plain = (
        int(widths(w)["hidden size"].max(initial=0)),
        attention & (w.latent == 0) & (w.value_dim == 0),
    )
    if (w.heads[plain] * w.head_dim[plain] != hidden).any():
        yield "heads"
    if architecture in DIVIDING and (hidden % np.maximum(w.heads[plain], 1)).any():
        yield "odd_heads"
    if (w.heads[plain] % np.maximum(w.kv_heads[plain], 1)).any():
        yield "groups"
    mlp = (down > 0) | routed | (linear & (w.part == Part.MLP))
    mixing = attention | (w.kind == Kind.DELTA_NET) | (linear & (w.part == Part.ATTENTION))
    if (_layers(w, mlp & inside) != _layers(w, mixing)).any():
        yield "sublayers"
    with_experts = covering(w, routed, w.experts) > 0  # their MLPs have another width
    if any(_differ(down[(down > 0) & (with_experts == some)]) for some in (False, True)):
        yield "layer_inner"
    if _differ(w.heads[attention]):
        yield "layer_heads"
    if _differ(w.kv_heads[plain]):
        yield "layer_kv_heads"
    if _differ(w.experts[routed]) or _differ(w.n[routed]):
        yield "layer_experts"
    if (w.is_role("select") & w.overhead & (w.part == Part.MLP) & with_experts).any():
        yield "expert_choice"
    if linear.any():
        yield "linear"
    if (w.stage > 0).any():
        yield "low_rank"
    if w.is_role("residual_projection").any():
        yield "residual_projections"
    if (w.is_role("router") & w.overhead).any():
        yield "routers"


def blocks(w: Workload) -> tuple[Block, ...]:
    """Return the different sublayers of a model on one device: attention, MLPs and experts, each as
    one block."""
    attention, down, routed = w.is_attention, widths(w)["MLP width"], w.kind == Kind.EXPERTS
    kv_heads = np.where(w.latent > 0, w.heads, w.kv_heads)
    pairs = np.unique(np.stack([w.heads, kv_heads])[:, attention], axis=1).T.tolist()
    groups = np.unique(np.stack([w.experts, w.n])[:, routed], axis=1).T.tolist()
    return (
        *(Block(heads, few, 0) for heads, few in pairs),
        *(Block(0, 0, inner) for inner in np.unique(down[down > 0]).tolist()),
        *(Block(0, 0, 0, experts=many, expert_inner=inner) for many, inner in groups),
    )


def shapes_of(dense: ModelConfig, pruned: Workload) -> ModelConfig:
    """Return a model with the layers, widths and experts of a pruned workload, equal in all
    layers."""
    layers, attention, routed = (
        layer_count(pruned),
        pruned.is_attention,
        pruned.kind == Kind.EXPERTS,
    )
    found = widths(pruned)
    latent = dense.latent is not None
    usual = Block(
        heads=_largest(pruned.heads[attention], dense.heads),
        kv_heads=dense.kv_heads if latent else _largest(pruned.kv_heads[attention], dense.kv_heads),
        inner=_largest(found["MLP width"], 0) if dense.inner else 0,
        experts=_largest(pruned.experts[routed], 0),
        active=float(pruned.active[routed].max(initial=0.0)),
        expert_inner=_largest(pruned.n[routed], 0),
    )
    model = replace(
        dense,
        layers=layers,
        windows=dense.windows[:layers],
        hidden=_largest(found["hidden size"], dense.hidden),
        blocks=(),
    )
    # layers that differ in an architecture, such as first layers without experts, keep their places
    return model.with_usual(usual, dense.blocks[:layers])


def _largest(values: Any, default: int) -> int:
    return int(np.max(values, initial=0)) or default


def config_of(source: str, r: Result) -> dict[str, Any]:
    """Return the content of the ``config.json`` of a predicted pruned model; InputError if it has
    no such file."""
    dense, content = load_model(source), content_of(source)
    if not content:
        raise InputError(
            f"{dense.name}: has no config.json to start from; expected a name or a file"
        )
    new = shapes_of(dense, prune(lower(dense, phase="decode", engine=""), r.prune))
    keys = changed_keys(dense, new, content)
    parallel = r.parallel if r.devices > 1 else "tensor"
    built, whole = (
        lower(m, phase="decode", devices=r.devices, parallel=parallel) for m in (new, dense)
    )
    pruned = prune(whole, r.prune)
    if pruned.parameters != built.parameters or not np.isclose(
        pruned.flops.sum(), built.flops.sum(), rtol=1e-9
    ):
        raise InputError(
            f"{r.pruning}: a config.json of {dense.architecture} cannot state its shapes"
        )
    return {**content, **keys}


def _refusal(found: Loading, feature: str, w: Workload, config: ModelConfig | None) -> str:
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
    inner = widths(w)["MLP width"]
    if feature == "layer_inner" and (odd := inner[inner % found.multiple > 0]).size:
        return f"it describes multiples of {found.multiple}, not {int(odd[0]):,}"
    return ""


def _kind(config: ModelConfig) -> str:
    """Return the model type whose code runs a model: Mistral without windows has the tensors and
    operators of Llama."""
    plain_mistral = config.architecture == "mistral" and not any(config.windows)
    return "llama" if plain_mistral else config.architecture


def _layers(w: Workload, mask: Array) -> BoolArray:
    marks = np.zeros(layer_count(w) + 1, dtype=np.int64)
    np.add.at(marks, w.layer[mask], 1)
    np.add.at(marks, (w.layer + w.layers)[mask], -1)
    return np.cumsum(marks)[:-1] > 0


def _differ(values: Array) -> bool:
    return len(values) > 0 and bool((values != values[0]).any())
