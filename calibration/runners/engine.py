"""Calibrate an engine: run smaller dense copies of a model in it, and infer its host times and a
factor per operator.

The engine's own profiler gives the time of every kernel of a pass, whose names say which operator
they compute. The factor of an operator is its measured over its predicted time, by tokens of a
pass. What remains of a pass without the profiler is the time of the host: per pass, per layer and
per sequence of a decode step. The results are the section ``engines`` of a profile.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from calibration.devices.protocol import Device, OutOfMemory, Unsupported
from calibration.measure.run import Interrupt, Interrupted
from calibration.records.store import Store
from calibration.runners.cases import Case, ModelRun, Runner, fewer_layers
from calibration.runners.compare import ENGINES, check_budget, runner_of
from calibration.runners.runs import begin
from calibration.validation.validate import DO_NOT_USE, USE, Judgement
from simulator.arrays import FloatArray
from simulator.errors import InputError, one_line
from simulator.hardware.profile import Correction, EngineTimes, HardwareProfile
from simulator.models.lower import lower
from simulator.operators import OPERATORS
from simulator.passes import tokens_of
from simulator.prediction.prunings import Pruning
from simulator.prediction.table import predict
from simulator.request import Name
from simulator.uncertainty.forward import forward_passes
from simulator.units import percent
from simulator.workload import Workload, WorkloadBatch

MEASURED = ("vllm", "hf")
ENGINE_RECORDS = "engine.{}.jsonl"
SETTINGS: Mapping[str, Sequence[tuple[int, int]]] = {
    "prefill": ((1, 128), (1, 512)),
    "decode": ((1, 128), (4, 128), (16, 128)),
}
"""Batch and prompt tokens of the passes that are observed by default, by phase."""

Setting = tuple[str, int, int]  # phase, batch, prompt tokens

PROFILED = 2.0
"""Time of a setting that its profile takes, in times of its samples (assumed)."""

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
    half: float  # relative half-width of the interval of ``seconds``
    operators: Mapping[str, float]  # measured time of each operator, s
    version: str

    @property
    def tokens(self) -> int:
        return self.batch * self.seq if self.phase == "prefill" else self.batch


def depths(layers: int) -> tuple[int, int]:
    """Return the layers of two copies: a quarter and three quarters of the model."""
    few = max(layers // 4, 1)
    return few, max(3 * layers // 4, few + 1)


def settings_of(
    phases: Sequence[str], batches: Sequence[int], lengths: Sequence[int]
) -> list[Setting]:
    """Return the settings of some phases, first one of each phase: every batch and length, or those
    of :data:`SETTINGS` if neither is given."""
    by_phase = list[list[Setting]]()
    for phase in phases:
        usual = SETTINGS[Name(tuple(SETTINGS)).check("--phase", phase)]
        given = itertools.product(batches or (1,), lengths or (128,))
        by_phase.append([(phase, *one) for one in (given if batches or lengths else usual)])
    return [one for some in itertools.zip_longest(*by_phase) for one in some if one is not None]


@dataclass(frozen=True)
class _Plan:
    """The passes of a calibration, and the time that is left for them."""

    model: ModelRun
    settings: Sequence[Setting]
    start: float
    budget_s: float
    clock: Callable[[], float]

    @property
    def left_s(self) -> float:
        return self.start + self.budget_s - self.clock()

    @property
    def layers(self) -> tuple[int, int]:
        return depths(len(self.model.config.layers))

    @property
    def passes(self) -> list[tuple[int, Setting]]:
        return list(itertools.product(self.layers, self.settings))

    def found(self, records: Iterable[Mapping[str, Any]]) -> list[Pass]:
        """Return the passes that have a record."""
        rows = {str(row["key"]): row for row in records}
        keys = ((layers, one, self.key(layers, one)) for layers, one in self.passes)
        return [_pass_of((layers, *one), rows[key]) for layers, one, key in keys if key in rows]

    def key(self, layers: int, setting: Setting) -> str:
        phase, batch, seq = setting
        of = self.model
        return (
            f"{of.engine} {of.config.name} {of.dtype} {phase} batch={batch} seq={seq}"
            f" layers={layers}"
        )


def observe(
    folder: Path,
    device: Device,
    model: ModelRun,
    settings: Sequence[Setting],
    budget_s: float,
    progress: Callable[[int, int], None] = lambda done_s, total_s: None,
) -> list[Pass]:
    """Run the copies of a model that ``folder`` does not hold yet, and return all passes. The first
    setting of every phase runs in both copies; the others run if the budget allows them. InputError
    if a copy cannot run; KeyboardInterrupt at the user's request, after the finished passes are
    kept."""
    name = ENGINE_RECORDS.format(model.engine)
    file, header = begin(folder, device, model.dtype, budget_s, name, model=model.config.name)
    plan = _Plan(model, settings, device.clock(), budget_s, device.clock)
    runners = {  # starts nothing
        n: runner_of(device, replace(model, config=fewer_layers(model.config, n)))
        for n in plan.layers
    }
    for runner in runners.values():
        check_budget(runner, budget_s)
    file.parent.mkdir(exist_ok=True)
    with Store(file, header) as kept, Interrupt() as interrupt:

        def interrupted() -> bool:
            progress(round(budget_s - plan.left_s), round(budget_s))
            return interrupt.requested

        for runner in runners.values():
            runner.interrupted = interrupted
        # the speed of a CPU drifts, so both copies run in turns; on a GPU, a copy needs the memory
        groups = [plan.layers] if device.name == "cpu" else [(n,) for n in plan.layers]
        try:
            for later, group in zip(reversed(range(len(groups))), groups):
                with contextlib.ExitStack() as opened:
                    some = {n: opened.enter_context(closing(runners[n])) for n in group}
                    _observe_copies(some, plan, kept, later)
        except Interrupted:
            done = f"{len(kept.rows)} of {len(plan.passes)} passes are in {file}"
            raise KeyboardInterrupt(f"{done}; run the command again to resume") from None
        return plan.found(kept.rows)


def _observe_copies(runners: Mapping[int, Runner], plan: _Plan, kept: Store, later: int) -> None:
    """Observe the passes of copies that run in turns, in their share of the time; ``later`` as many
    starts follow."""
    todo = _todo(runners, plan, kept)
    least = len({phase for phase, _, _ in plan.settings}) * len(runners)
    before_s = plan.left_s
    try:
        for layers in runners:
            _refuse_interrupt(runners[layers])
            for _, _, case in [one for one in todo if one[0] == layers][:1]:
                runners[layers].begin(case)
        for runner in runners.values():
            runner.wait_ready()
        # what follows takes as long to start, and gets as much time
        started_s = before_s - plan.left_s
        end_s = plan.left_s - (plan.left_s - later * started_s) / (1 + later)
        longest_s = 0.0  # time of the longest pass so far
        for number, (layers, key, case) in enumerate(todo):
            _refuse_interrupt(runners[layers])
            left_s = plan.left_s - end_s
            if left_s <= longest_s and number >= least:
                return
            share_s = left_s / (len(todo) - number)
            found = runners[layers].observe(case, share_s / (1.0 + PROFILED))
            longest_s = max(longest_s, left_s + end_s - plan.left_s)
            about = {"type": "engine", "key": key, "model": plan.model.config.name}
            kept.append({**about, **asdict(found)})
    except (Unsupported, OutOfMemory, RuntimeError, MemoryError) as error:
        raise InputError(f"{plan.model.engine}: {one_line(str(error), 300)}") from None


def _todo(runners: Mapping[int, Runner], plan: _Plan, kept: Store) -> list[tuple[int, str, Case]]:
    """Return layers, key and case of the passes that have no record; every case can run."""
    done = {str(row["key"]) for row in kept.rows}
    todo = list[tuple[int, str, Case]]()
    for setting, layers in itertools.product(plan.settings, runners):
        if (key := plan.key(layers, setting)) not in done:
            w = workload_of(plan.model, layers, *setting)
            todo.append((layers, key, Case(Pruning(()), (), w, w)))
            runners[layers].check(todo[-1][2])
    return todo


def _refuse_interrupt(runner: Runner) -> None:
    if runner.interrupted():
        raise Interrupted


def _pass_of(one: tuple[int, str, int, int], row: Mapping[str, Any]) -> Pass:
    operators = dict[str, float]()
    for kernel, seconds in row["kernels"].items():
        if name := operator_of(kernel):
            operators[name] = operators.get(name, 0.0) + seconds
    seconds, busy = float(row["seconds"]), sum(operators.values())
    # the profiler slows operators of the host; together they take at most the pass without it
    known = {name: own * min(1.0, seconds / busy) for name, own in operators.items()}
    return Pass(*one, seconds, float(row.get("half", 0.0)), known, str(row["version"]))


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
            " with a larger --budget"
        )
    every = sorted({one.tokens for one in passes})
    operators = {
        name: _correction(found, every)
        for name, found in _kernel_ratios(passes, model, replace(hw, engines={})).items()
    }
    version = passes[0].version
    times = EngineTimes(version, source, 0.0, 0.0, 0.0, HOST_LOG_SD, tuple(every), operators)
    return _with_host(times, passes, model, hw)


def _kernel_ratios(
    passes: Sequence[Pass], model: ModelRun, plain: HardwareProfile
) -> dict[str, dict[int, list[float]]]:
    """Return log(measured / predicted) of each operator, by the tokens of a pass."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for one in sorted(passes, key=lambda one: one.tokens):
        w = workload_of(model, one.layers, one.phase, one.batch, one.seq)
        row_s = forward_passes(WorkloadBatch.of([w]), plain).row_s
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
                less = float((row_s * np.exp(np.interp(np.log2(tokens), at, mean)))[fewer].sum())
                ratio = max(measured - less, 0.1 * measured) / float(row_s[own].sum())
                known.setdefault(one.tokens, []).append(math.log(ratio))
    return ratios


def _with_host(
    times: EngineTimes, passes: Sequence[Pass], model: ModelRun, hw: HardwareProfile
) -> EngineTimes:
    """Return the times with those of the host: the rest of the decode passes (without any, of the
    prefills) by least squares of relative errors."""
    phase = "decode" if any(one.phase == "decode" for one in passes) else "prefill"
    chosen = [one for one in passes if one.phase == phase]
    with_kernels = replace(hw, engines={model.engine: times}, path=None)
    batch = WorkloadBatch.of(
        [workload_of(model, one.layers, one.phase, one.batch, one.seq) for one in chosen]
    )
    # an eager host launches while the device works, which this total contains
    seconds = np.array([one.seconds for one in chosen])
    rest = 1.0 - forward_passes(batch, with_kernels).total_s / seconds
    parts = np.array([(1.0, one.layers, one.batch) for one in chosen]) / seconds[:, None]
    host, _ = nnls(parts, rest)
    fitted = parts @ host
    off = float(np.sqrt(np.mean((rest - fitted) ** 2)) / max(float(np.mean(fitted)), 1e-9))
    each_pass, each_layer, each_sequence = host.tolist()
    return replace(
        times,
        each_pass=each_pass,
        each_layer=each_layer,
        each_sequence=each_sequence,
        host_log_sd=round(min(max(off, HOST_LOG_SD), 3.0), 3),
    )


@dataclass(frozen=True)
class ComparedPass:
    layers: int
    phase: str
    batch: int
    seq: int
    seconds: float
    half: float  # relative half-width of its interval
    before_s: float  # predicted without the engine's calibration
    after_s: float
    held_out_s: float  # predicted by a calibration without this pass


@dataclass(frozen=True)
class CalibratedEngine:
    profile: HardwareProfile
    times: EngineTimes
    compared: tuple[ComparedPass, ...]
    half_before: float  # median half-width of the interval of a speedup
    half_after: float

    def errors(self, name: str) -> FloatArray:
        """Return the errors of a column of predicted times, absolute logs."""
        return np.array([abs(math.log(getattr(one, name) / one.seconds)) for one in self.compared])

    def judged(self, file: str) -> Judgement:
        """Judge the calibration by passes that are left out of it in turn. It is used if it reduces
        their errors by more than two standard errors: noise of the passes must not decide."""
        before, held_out = self.errors("before_s"), self.errors("held_out_s")
        gain = before - held_out
        fact = (
            f"it predicts passes that are left out within {percent(float(np.median(held_out)))}"
            f" (median; without it: {percent(float(np.median(before)))})"
        )
        if gain.mean() <= 2.0 * gain.std() / math.sqrt(len(gain)):
            text = f"{file} is unchanged: {fact}, which is no clear gain; measure longer."
            return Judgement(DO_NOT_USE, (text,), ("no clear gain",))
        width = (
            f"the interval of a speedup is +-{percent(self.half_after)} (without it:"
            f" +-{percent(self.half_before)})"
        )
        return Judgement(USE, (f"Use {file} as --hardware: {fact}, and {width}.",))


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
        others = [other for other in passes if other != one]
        if len({other.layers for other in others}) < 2:
            others = list(passes)
        without = engine_times(others, model, hw, times.source)
        held_out = replace(hw, engines={model.engine: without}, path=None)
        predicted = (
            float(forward_passes(batch, device).total_s[0]) for device in (plain, profile, held_out)
        )
        compared.append(ComparedPass(*setting, one.seconds, one.half, *predicted))
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
