"""Calibrate an engine: run smaller dense copies of a model in it, and infer its host times and a
factor per operator.

The engine's own profiler gives the time of every kernel of a pass, whose names say which operator
they compute. The factor of an operator is its measured over its predicted time, by tokens of a
pass. What remains of a pass without the profiler is the time of the host: per pass, per layer and
per sequence of a decode step. The results are the section ``engines`` of a profile.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from calibration.devices.protocol import Device, OutOfMemory, Unsupported
from calibration.measure.run import Interrupt, Interrupted
from calibration.records.store import Store
from calibration.runners.cases import Case, ModelRun, fewer_layers
from calibration.runners.compare import ENGINES, runner_of
from calibration.runners.runs import begin
from simulator.arrays import FloatArray
from simulator.errors import InputError, one_line
from simulator.hardware.profile import Correction, EngineTimes, HardwareProfile
from simulator.models.lower import lower
from simulator.operators import OPERATORS
from simulator.passes import tokens_of
from simulator.prediction.prunings import Pruning
from simulator.prediction.table import predict
from simulator.uncertainty.forward import forward_passes
from simulator.units import percent
from simulator.workload import Workload, WorkloadBatch

MEASURED = ("vllm", "hf")
ENGINE_RECORDS = "engine.{}.jsonl"
SETTINGS = (
    ("prefill", 1, 128),
    ("prefill", 1, 512),
    ("decode", 1, 128),
    ("decode", 4, 128),
    ("decode", 16, 128),
)
"""Phase, batch and prompt tokens of the observed passes."""

LEAST_LOG_SD = 0.02
"""Least log standard deviation of a factor over shapes, and of two runs of one pass."""

HOST_LOG_SD = 0.1
"""Least log standard deviation of the host's time."""

_OPERATORS = (
    ("elementwise", r"(reshape|concat)_and_cache"),
    ("experts", r"moe|expert|grouped"),
    ("state_space", r"mamba_chunk_scan|selective_(state_update|scan)"),
    ("short_conv", r"causal_conv1d|short_conv"),
    ("delta_net", r"gated_delta|delta_rule|gdn"),
    ("attention", r"attention|attn|flash|fmha|mha"),
    ("gemm", r"(?<!co)mm|gemm|cutlass|nvjet|xmma|cublas|matmul|_linear_pointwise"),
    (
        "elementwise",
        r"^Memcpy DtoD|^Memset|^triton_|fused|_C::|^aten::|elementwise|reduce|copy"
        r"|CompiledFxGraph|norm|rotary|silu",
    ),
)
_HOST = re.compile(
    r"^vllm::unified"
    r"|^aten::(view|slice|split|chunk|narrow|as_strided|empty|item|reshape|transpose|t|expand"
    r"|unsqueeze|squeeze|select|permute|unbind|detach|alias|resize_|to|linear|matmul|_unsafe_view|contiguous)$"
)


def operator_of(kernel: str) -> str:
    """Return the operator that a kernel computes by its name: "" for one of the host."""
    if _HOST.search(kernel):
        return ""
    return next(
        (name for name, pattern in _OPERATORS if re.search(pattern, kernel, re.IGNORECASE)), ""
    )


@dataclass(frozen=True)
class Pass:
    """An observed pass of a dense copy."""

    layers: int
    phase: str
    batch: int
    seq: int
    seconds: float
    operators: Mapping[str, float]  # measured time of each operator, s
    version: str

    @property
    def tokens(self) -> int:
        return self.batch * self.seq if self.phase == "prefill" else self.batch


def depths(layers: int) -> tuple[int, int]:
    """Return the layers of two copies: a quarter and three quarters of the model."""
    few = max(layers // 4, 1)
    return few, max(3 * layers // 4, few + 1)


def observe(
    folder: Path,
    device: Device,
    model: ModelRun,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Pass]:
    """Run the copies of a model that ``folder`` does not hold yet, and return all passes.
    InputError if a copy cannot run; KeyboardInterrupt at the user's request, after the finished
    passes are kept."""
    name = ENGINE_RECORDS.format(model.engine)
    file, header = begin(folder, device, model.dtype, 1.0, name, model=model.config.name)
    copies = {
        n: replace(model, config=fewer_layers(model.config, n))
        for n in depths(len(model.config.layers))
    }
    runners = {n: runner_of(device, copy) for n, copy in copies.items()}  # starts nothing
    file.parent.mkdir(exist_ok=True)
    planned = [(layers, *setting) for layers in copies for setting in SETTINGS]
    with Store(file, header) as kept, Interrupt() as interrupt:
        done = {str(row["key"]) for row in kept.rows}
        for layers, copy in copies.items():
            todo = [one for one in planned if one[0] == layers and _key(model, *one) not in done]
            with closing(runners[layers]) as runner:
                runner.interrupted = lambda: interrupt.requested
                cases = [_case_of(copy, *one) for one in todo]
                for case in cases:
                    runner.check(case)
                for one, case in zip(todo, cases):
                    if interrupt.requested:
                        raise KeyboardInterrupt
                    try:
                        found = runner.observe(case)
                    except Interrupted:
                        raise KeyboardInterrupt from None
                    except (Unsupported, OutOfMemory, RuntimeError, MemoryError) as error:
                        reason = one_line(str(error), 300)
                        raise InputError(
                            f"{model.engine}, {layers} layers, {case.phase}: {reason}"
                        ) from None
                    kept.append(
                        {
                            "type": "engine",
                            "key": _key(model, *one),
                            "model": model.config.name,
                            **asdict(found),
                        }
                    )
                    progress(planned.index(one) + 1, len(planned))
        rows = {str(row["key"]): row for row in kept.rows}
    return [_pass_of(one, rows[key]) for one in planned if (key := _key(model, *one)) in rows]


def _case_of(model: ModelRun, *setting: Any) -> Case:
    w = workload_of(model, *setting)
    return Case(Pruning(()), (), w, w)


def _key(model: ModelRun, layers: int, phase: str, batch: int, seq: int) -> str:
    return (
        f"{model.engine} {model.config.name} {model.dtype} {phase} batch={batch} seq={seq}"
        f" layers={layers}"
    )


def _pass_of(one: tuple[int, str, int, int], row: Mapping[str, Any]) -> Pass:
    operators = dict[str, float]()
    for kernel, seconds in row["kernels"].items():
        if name := operator_of(kernel):
            operators[name] = operators.get(name, 0.0) + seconds
    return Pass(*one, float(row["seconds"]), operators, str(row["version"]))


def workload_of(model: ModelRun, layers: int, phase: str, batch: int, seq: int) -> Workload:
    config = fewer_layers(model.config, layers)
    lowered = ENGINES[model.engine].lowered
    return lower(config, phase=phase, batch=batch, seq=seq, dtype=model.dtype, engine=lowered)


def engine_times(
    passes: Sequence[Pass], model: ModelRun, hw: HardwareProfile, source: str
) -> EngineTimes:
    """Return host times and factors from passes of copies of a model; InputError for passes of one
    depth."""
    if len({one.layers for one in passes}) < 2:
        raise InputError(
            "engine: expected passes of copies with two numbers of layers; run the command again"
        )
    plain = replace(hw, engines={})
    # log(measured / predicted) by operator and tokens
    ratios: dict[str, dict[int, list[float]]] = {}
    rest = []
    host = []
    for one in sorted(passes, key=lambda one: one.tokens):
        w = workload_of(model, one.layers, one.phase, one.batch, one.seq)
        p = forward_passes(WorkloadBatch.of([w]), plain)
        tokens = tokens_of(w)
        for operator in OPERATORS:
            rows = w.kind == operator.code
            name = "attention" if operator.name.endswith("attention") else operator.name
            measured = one.operators.get(name, 0.0)
            own = rows & (tokens == one.tokens)
            if measured > 0.0 and own.any():
                # the head of a prefill computes fewer tokens, whose factor a pass of fewer tokens
                # has given
                known = ratios.setdefault(operator.name, {})
                fewer = rows & ~own
                at = [math.log2(t) for t in known] or [0.0]
                mean = [float(np.mean(found)) for found in known.values()] or [0.0]
                less = float((p.row_s * np.exp(np.interp(np.log2(tokens), at, mean)))[fewer].sum())
                ratio = max(measured - less, 0.1 * measured) / float(p.row_s[own].sum())
                known.setdefault(one.tokens, []).append(math.log(ratio))
        if one.phase == "decode":
            # an eager host launches while the device works: the slower of the two is already in the
            # prediction
            busy = max(sum(one.operators.values()) + float(p.gap_s[0]), float(p.host.launch.sum()))
            rest.append(max(one.seconds - busy, 0.0))
            host.append((1.0, one.layers, one.batch))
    (each_pass, each_layer, each_sequence), _ = nnls(np.array(host), np.array(rest))
    fitted = np.array(host) @ np.array([each_pass, each_layer, each_sequence])
    off = float(
        np.sqrt(np.mean((np.array(rest) - fitted) ** 2)) / max(float(np.mean(fitted)), 1e-9)
    )
    every = sorted({one.tokens for one in passes})
    return EngineTimes(
        version=passes[0].version,
        source=source,
        each_pass=float(each_pass),
        each_layer=float(each_layer),
        each_sequence=float(each_sequence),
        host_log_sd=round(min(max(off, HOST_LOG_SD), 3.0), 3),
        tokens=tuple(every),
        operators={name: _correction(found, every) for name, found in ratios.items()},
    )


@dataclass(frozen=True)
class ComparedPass:
    layers: int
    phase: str
    batch: int
    seq: int
    seconds: float
    before_s: float  # predicted without the engine's calibration
    after_s: float


@dataclass(frozen=True)
class CalibratedEngine:
    profile: HardwareProfile
    times: EngineTimes
    compared: tuple[ComparedPass, ...]
    half_before: float  # median half-width of the interval of a speedup
    half_after: float

    def conclusion(self, file: str) -> str:
        measured = np.array([one.seconds for one in self.compared])
        before, after = (
            float(
                np.median(
                    np.abs(np.array([getattr(one, name) for one in self.compared]) / measured - 1.0)
                )
            )
            for name in ("before_s", "after_s")
        )
        return (
            f"Use {file} as --hardware: it predicts the measured passes within {percent(after)}"
            f" (median; before: {percent(before)}), and the interval of a speedup is"
            f" +-{percent(self.half_after)} (before: +-{percent(self.half_before)})."
        )


EXAMPLES = ("depth 0.25", "width mlp=0.5")
"""Prunings whose intervals say what a calibration gains."""


def calibrated(passes: Sequence[Pass], model: ModelRun, hw: HardwareProfile) -> CalibratedEngine:
    """Return the profile with an engine's measured times, next to the predictions without them."""
    times = engine_times(
        passes, model, hw, f"measured here on copies of {model.config.name}, {model.dtype}"
    )
    profile = replace(hw, engines={**hw.engines, model.engine: times}, path=None)
    plain = replace(hw, engines={k: v for k, v in hw.engines.items() if k != model.engine})
    compared = list[ComparedPass]()
    for one in passes:
        setting = (one.layers, one.phase, one.batch, one.seq)
        batch = WorkloadBatch.of([workload_of(model, *setting)])
        before_s, after_s = (
            float(forward_passes(batch, device).total_s[0]) for device in (plain, profile)
        )
        compared.append(ComparedPass(*setting, one.seconds, before_s, after_s))
    half_before, half_after = (_half_width(model, device) for device in (plain, profile))
    return CalibratedEngine(profile, times, tuple(compared), half_before, half_after)


def _half_width(model: ModelRun, hw: HardwareProfile) -> float:
    """Return the median half-width of the intervals of some speedups, as a factor less 1."""
    request = {"dtype": model.dtype, "engine": ENGINES[model.engine].lowered}
    speedups = (
        predict(model.config, text, hw, phase=phase, batch=1, seq=128, **request)
        for phase, text in itertools.product(("prefill", "decode"), EXAMPLES)
    )
    return float(np.median([math.sqrt(s.upper / s.lower) - 1.0 for s in speedups]))


def _correction(found: Mapping[int, Sequence[float]], tokens: Sequence[int]) -> Correction:
    """Return the factor of an operator at each number of tokens. Its scatter has two parts: how
    copies of two depths differ, and a quarter of the step between two neighbours, because shapes
    between them are interpolated."""
    at = sorted(found)
    mean: FloatArray = np.array([np.mean(found[t]) for t in at])
    apart = np.concatenate([np.asarray(found[t]) - np.mean(found[t]) for t in at])
    between = 0.25 * np.diff(mean) if len(at) > 1 else np.zeros(1)
    log_sd = math.sqrt(LEAST_LOG_SD**2 + float(np.mean(apart**2)) + float(np.mean(between**2)))
    factors = np.exp(np.interp(np.log2(tokens), np.log2(at), mean))
    return Correction(
        tuple(float(f"{min(max(f, 0.01), 100.0):.4g}") for f in factors.tolist()), round(log_sd, 4)
    )
