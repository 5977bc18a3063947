"""Power and energy of published servers whose queue is never empty (ML.ENERGY) next to predictions,
and the sections ``power`` that are fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from calibration.evidence.measurements import published
from calibration.evidence.schedules import ENDS, PROMPTS, WORST, Row, interval, steady, tokens_per_s
from calibration.fit.power import fit_power
from calibration.validation.scoring import Comparison, percent, score_of, table
from simulator.arrays import Array, BoolArray, FloatArray
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile, Section
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.power import Power, Work
from simulator.prediction.requests import by_key
from simulator.request import Request
from simulator.serving.steps import TYPICAL
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

SAMPLER_S = 0.36e-9  # per entry of the vocabulary and sequence (simulator/engines/vllm.yaml)
PROMPT_TOKENS = 4096  # prompt tokens of the prefills that join a step
HALF = 1.645  # standard deviations of a 90 % interval
QUANTITIES: Mapping[str, str] = {"W": "power", "J": "energy per token"}
CAUSES: Mapping[str, str] = {
    "b200_sxm gpqa": "the host takes 30 ms per step or more, at any batch and for every model",
    "b200_sxm lm-arena-chat": "the host varies from run to run",
}


@dataclass(frozen=True)
class Servers:
    """Runs on one GPU: the work of a mean step, its measured time, and the mean power."""

    hw: HardwareProfile
    rows: Sequence[Row]
    work: Work  # (runs, 1)
    sampler_s: FloatArray  # time in which the sampler sorts
    watts: FloatArray  # power of one GPU

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Servers:
        hw = load_hardware(rows[0]["hardware"])
        parts = [_work(row, hw) for row in rows]
        joined = Work(*(np.concatenate(part) for part in zip(*parts)))
        # each tensor-parallel device samples all sequences
        sampler = [SAMPLER_S * load_model(row["model"]).vocab * float(row["batch"]) for row in rows]
        watts = np.array([float(row["watts"]) for row in rows])
        return cls(hw, rows, joined, np.array(sampler), watts)

    @property
    def models(self) -> Array:
        return np.array([load_model(row["model"]).name for row in self.rows])

    def take(self, which: BoolArray) -> Servers:
        return Servers(
            self.hw,
            [row for row, used in zip(self.rows, which) if used],
            Work(*(part[which] for part in self.work)),
            self.sampler_s[which],
            self.watts[which],
        )

    def at(self, seconds: FloatArray) -> Servers:
        """Return the runs with another time of their mean steps."""
        return replace(self, work=self.work._replace(time=seconds[:, None]))

    def fit(self) -> tuple[Section, float]:
        share = self.sampler_s / self.work.time[:, 0]
        return fit_power(self.hw, self.work, self.watts, further=share)

    def predicted(self, section: Section, sampler: float) -> tuple[FloatArray, FloatArray]:
        """Return predicted powers, W, and the standard deviations of their logs."""
        seconds = self.work.time[:, 0]
        hw = replace(self.hw, sections={**self.hw.sections, ("power", "*"): section})
        power = Power.of(hw)
        joules = power.joules(self.work)[..., 0]
        total = joules.sum(axis=0) + sampler * hw.power_w * self.sampler_s
        error = joules / np.maximum(total, 1e-300) * power.log_sd[:, None]
        return np.minimum(total / seconds, hw.power_w), np.sqrt(np.square(error).sum(axis=0))


def _work(row: Row, hw: HardwareProfile) -> Work:
    """Return the work of a run per step: a decode step and the prompts that join in its time."""
    request, batch = steady(row).request, float(row["batch"])
    prompt, output = PROMPTS[row["task"]], float(row["new_tokens"])
    step = replace(request, phase="decode", batch=round(batch), seq=round(prompt + 0.5 * output))
    prompts = PROMPT_TOKENS // prompt
    prefill = replace(request, phase="prefill", batch=prompts, seq=prompt)
    parts = [_of_pass(one, hw) for one in (step, prefill)]
    joining = batch / output / prompts
    seconds = np.array([[batch / float(row["tokens_per_s"])]])
    return Work(seconds, *(a + joining * b for a, b in zip(*(part[1:] for part in parts))))


def _of_pass(request: Request, hw: HardwareProfile) -> Work:
    work = forward_passes(WorkloadBatch.of([lower(request)]), hw).work
    return Work(*(part.sum(axis=1, keepdims=True) for part in work))


def servers() -> Mapping[str, Servers]:
    """Return the runs by GPU. Runs with expert parallelism are left out: their devices wait for
    each other for a time that no row states."""
    rows = [row for row in published("steady") if not row["parallel"]]
    return {name: Servers.of(some) for name, some in by_key(rows, itemgetter("hardware")).items()}


def compare_power(runs: Servers) -> list[Comparison]:
    """Return mean powers, W, at measured throughputs, by fits without the runs of the same
    model."""
    watts, deviation = _held_out(runs, runs.work.time[:, 0])
    half = np.exp(HALF * deviation)
    return _comparisons(runs, "W", runs.watts, (watts, watts / half, watts * half))


def compare_energy(runs: Servers) -> list[Comparison]:
    """Return energies per output token of one GPU, J, at simulated throughputs. The interval
    combines the errors of power and of time as a root of sum of squares of logs."""
    tokens = [
        [tokens_per_s(steady(row).run(errors)) for errors in (TYPICAL, *ENDS)] for row in runs.rows
    ]
    rates = np.array(tokens).T
    batch = np.array([float(row["batch"]) for row in runs.rows])
    energies = [_held_out(runs, batch / rate)[0] / rate for rate in rates]
    deviation = _held_out(runs, batch / rates[0])[1]
    lower, upper = interval(energies[0], energies[1:], HALF * deviation)
    measured = np.array([float(row["watts"]) / float(row["tokens_per_s"]) for row in runs.rows])
    return _comparisons(runs, "J", measured, (energies[0], lower, upper))


def _held_out(runs: Servers, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return powers at some times of a step, by fits without the runs of the same model, and the
    standard deviations of their logs."""
    models = runs.models
    watts, deviation = np.zeros((2, len(models)))
    for model in dict.fromkeys(models.tolist()):
        same = models == model
        fitted = runs.take(~same).fit()
        watts[same], deviation[same] = runs.at(seconds).take(same).predicted(*fitted)
    return watts, deviation


def _comparisons(
    runs: Servers, unit: str, measured: FloatArray, found: tuple[FloatArray, ...]
) -> list[Comparison]:
    return [
        Comparison(
            what=row["model"],
            where=f"{row['task']}, {float(row['batch']):.0f} sequences",
            measured=float(measured[i]),
            predicted=float(found[0][i]),
            lower=float(found[1][i]),
            upper=float(found[2][i]),
            source=unit,
            reason=CAUSES.get(f"{row['hardware']} {row['task']}", ""),
            gpu=row["hardware"],
        )
        for i, row in enumerate(runs.rows)
    ]


def power_tables() -> list[str]:
    """Return the tables of ``docs/generated/energy.md`` in their order."""
    found = servers()
    rows = [c for runs in found.values() for c in (*compare_power(runs), *compare_energy(runs))]
    constants = [
        [name, *(f"{c.value:.2f} ({c.std_error:.2f})" for c in runs.fit()[0].constants.values())]
        for name, runs in found.items()
    ]
    pairs = [(key, c) for c in rows for key in _groups_of(c)]
    cells = []
    for key, some in sorted(by_key(pairs, itemgetter(0)).items()):
        s = score_of([c for _, c in some])
        scores = s["median"], s["median bias"], s["coverage"], s["half-width"]
        cells.append([*key, str(len(some)), *map(percent, scores)])
    worst = sorted(rows, key=lambda c: -abs(np.log(c.predicted / c.measured)))[:WORST]
    largest = [
        [
            *(c.gpu, QUANTITIES[c.source], c.what, c.where),
            f"{c.predicted / c.measured:.2f}",
            c.reason or "not known",
        ]
        for c in worst
    ]
    names = ["GPU", "quantity", "model", "task", "runs"]
    header = ["GPU", "quantity", "model", "run", "predicted / measured", "cause"]
    return [
        table(["GPU", *found["h100_sxm"].fit()[0].constants], constants),
        table([*names, "error", "bias", "inside", "half-width"], cells, left=(0, 1, 2, 3)),
        table(header, largest, left=(0, 1, 2, 3, 5)),
    ]


def _groups_of(c: Comparison) -> list[tuple[str, ...]]:
    """Return the GPU, quantity, model and task of each line that counts a comparison."""
    task = c.where.partition(",")[0]
    rest = [] if task == "gpqa" else [("all", "without gpqa")]
    groups = [("all", ""), *rest, ("all", task), (c.what, task)]
    return [(c.gpu, QUANTITIES[c.source], *group) for group in groups]
