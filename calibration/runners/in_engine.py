"""Run the installed engine on a device whose operators were measured: its host times, then one
dense and one pruned model, predicted beside measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calibration.devices import open_device
from calibration.devices.protocol import Device
from calibration.fit.solver import FittedPart
from calibration.runners.cases import Case, ModelRun, cases_of, fewer_layers
from calibration.runners.compare import ENGINES, ComparedSpeedup, compare, rows_of
from calibration.runners.engine import EXAMPLES, CalibratedEngine, calibrated, observe, settings_of
from calibration.validation.validate import Judgement
from simulator.capacity import weights_bytes
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.save import save_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.write import content_of
from simulator.units import percent, ratio
from simulator.workload import WorkloadBatch

# layers of the compared models: more take longer to make and show nothing else
MOST_LAYERS = 8
MODEL_SHARE = 0.6  # share of the memory for the weights of the dense and of the pruned model
HOST_SHARE = 0.5  # share of the time for the engine's host; the rest is for the two models
PHASES = ("prefill", "decode")
SEQ = 512  # prompt tokens of the compared passes
# shortest calibration of a CPU with vLLM: each of four starts takes 90 s of a core (AMD EPYC), and
# the engine has 40 % of the time
VLLM_ON_CPU_S = 480.0


def installed_engine(python: str = "", on_cpu: bool = False) -> str:
    """Return the engine that this machine can run: vllm, hf (Transformers), or "". A CPU takes
    Transformers first, because a start of vLLM takes about 90 s of a core."""
    transformers = "hf" if find_spec("torch") and find_spec("transformers") else ""
    if python or (find_spec("vllm") and not (on_cpu and transformers)):
        return "vllm"
    return transformers


def check_engine_budget(engine: str, device: str, budget_s: float) -> None:
    """Raise InputError for a time in which four models of vLLM do not start on a CPU."""
    if engine == "vllm" and device == "cpu" and budget_s < VLLM_ON_CPU_S:
        raise InputError(
            f"--budget: expected at least {VLLM_ON_CPU_S:.0f}s with --engine vllm, which starts"
            f" four models on this CPU, got {budget_s:g}s; --engine hf needs less"
        )


def default_model(on_cpu: bool) -> str:
    return "smollm2-135m" if on_cpu else "llama-3.1-8b"


def layers_that_fit(model: Model, dtype: str, memory_bytes: float, most: int = MOST_LAYERS) -> int:
    """Return the layers, at most ``most``, of which a dense and a pruned copy fit into a memory."""

    def fits(layers: int) -> bool:
        w = lower(fewer_layers(model, layers), dtype=dtype)
        stored = float(weights_bytes(WorkloadBatch.of([w]))[0])
        return 2.0 * stored <= MODEL_SHARE * memory_bytes

    numbers = range(min(most, len(model.layers)), 1, -1)
    return next((layers for layers in numbers if fits(layers)), 1)


def layers_on(device: str, model: str, dtype: str) -> int:
    """Return the layers of a model of which a dense and a pruned copy fit on a device."""
    config = load_model(model)
    with closing(open_device(device)) as opened:
        memory_bytes = opened.describe().memory_bytes or math.inf
    return layers_that_fit(config, dtype, memory_bytes, len(config.layers))


def small_model(name: str, engine: str, dtype: str, device: Device) -> ModelRun:
    """Return the first layers of a model that fit a device twice."""
    config = load_model(name)
    layers = layers_that_fit(config, dtype, device.describe().memory_bytes or math.inf)
    return ModelRun(fewer_layers(config, layers), dtype, engine, content_of(name))


@dataclass(frozen=True)
class EngineCheck:
    """An engine's calibration, and its dense and pruned model next to their predictions."""

    title: str  # title of the engine
    model: str
    found: CalibratedEngine | None  # None: no pass could be taken apart
    rows: tuple[ComparedSpeedup, ...]
    notes: tuple[str, ...]
    stopped: str  # reason of an early end, or ""

    @property
    def outside(self) -> list[ComparedSpeedup]:
        """Measured speedups whose interval and that of the prediction have nothing in common."""
        return [
            r
            for r in self.rows
            if r.measured_upper < r.predicted_lower or r.measured_lower > r.predicted_upper
        ]


def check_engine(
    file: Path,
    device: Device,
    model: ModelRun,
    hw: HardwareProfile,
    budget_s: float,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> EngineCheck:
    """Measure an engine's host, write the profile with it to ``file``, and compare one dense and
    one pruned model with their predictions. Exceptions are those of :func:`compare`."""
    start, found, notes = device.clock(), None, tuple[str, ...]()
    settings = settings_of(PHASES, (), ())
    try:
        passes = observe(file.parent, device, model, settings, HOST_SHARE * budget_s, progress)
        found = calibrated(passes, model, hw)
        if not found.judged(str(file)).status:
            hw = found.profile
            save_hardware(hw, file)
    except InputError as error:  # the two models may run without the profiler
        notes = (f"host times of {model.engine} are not measured: {error}",)
    left_s = max(budget_s - (device.clock() - start), (1.0 - HOST_SHARE) * budget_s)
    cases = _cases(model)
    compared = compare(file.parent, device, model, cases, left_s, progress)
    about: dict[str, Any] = {
        "device": device.describe().device,
        "dtype": model.dtype,
        "engine": model.engine,
    }
    return EngineCheck(
        ENGINES[model.engine].title,
        model.config.name,
        found,
        tuple(rows_of(cases, compared.records, hw, **about)),
        (*notes, *compared.notes),
        compared.stopped if compared.left else "",
    )


def _cases(model: ModelRun) -> list[Case]:
    settings = {
        "phase": PHASES,
        "batch": 1,
        "seq": SEQ,
        "dtype": model.dtype,
        "engine": ENGINES[model.engine].lowered,
        "prune": EXAMPLES[-1:],
    }
    return cases_of(model.config, settings)[0]


NEEDED = ("gemm", "attention_prefill", "attention_decode", "elementwise")
"""Operators that every decoder runs."""


def trust(
    file: Path,
    judged: Judgement,
    parts: Sequence[FittedPart],
    dtype: str,
    check: EngineCheck | None,
) -> str:
    """Return one sentence: whether to trust a profile, and which operators are borrowed."""
    about = "; ".join(judged.reasons)
    borrowed = _borrowed(load_hardware(file), parts, dtype)
    if judged.status:
        return f"Do not trust {file}: {about}; {borrowed}."
    careful = f", with care ({about})" if about else ""
    return f"Trust {file}{careful}: {_in_words(check)}; {borrowed}."


def _in_words(check: EngineCheck | None) -> str:
    """Return how the speedups of an engine agree with their predictions."""
    if check is None or not check.rows:
        return "no engine ran here, so its host and its fusions are not checked"
    if not check.outside:
        errors = percent(max(abs(r.error) for r in check.rows))
        return f"a pruned model in {check.title} gained what it predicts, within {errors}"
    worst = max(check.outside, key=lambda r: abs(r.error))
    found = f"{worst.pruning} in {worst.phase} gained {ratio(worst.measured)}x"
    range_ = f"{ratio(worst.predicted_lower)}-{ratio(worst.predicted_upper)}x"
    return f"only for operators, as {found} in {check.title}, predicted {range_}"


def _borrowed(hw: HardwareProfile, parts: Sequence[FittedPart], dtype: str) -> str:
    """Return which operators the profile has from other measurements than these, or lacks."""
    own = {part.operator for part in parts}
    sources = dict[str, list[str]]()
    for (operator, name), section in hw.sections.items():
        if operator not in own | {"runtime"} and name in (dtype, "*"):
            stack = f" for {section.stack}" if section.stack else ""
            sources.setdefault(f"{hw.fitted_on(section) or hw.name}{stack}", []).append(operator)
    groups = [f"{', '.join(names)} from {source}" for source, names in sources.items()]
    missing = [name for name in NEEDED if hw.section(name, dtype).status == "default"]
    lacks = f"; without a fit: {', '.join(missing)}" if missing else ""
    return (f"borrowed: {'; '.join(groups)}" if groups else "no operator is borrowed") + lacks
