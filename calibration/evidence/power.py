"""Power and energy of published steady servers (ML.ENERGY) next to predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.evidence.build_profiles import rounded
from calibration.evidence.measurements import PUBLISHED, published
from calibration.evidence.schedules import PROMPTS, Row, steady
from calibration.fit.power import fit_power
from simulator.arrays import BoolArray, FloatArray
from simulator.hardware.library import load_hardware, profiles_folder
from simulator.hardware.profile import HardwareProfile, Provenance, Section
from simulator.hardware.save import save_stack
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.power import Power, Work
from simulator.request import Request
from simulator.uncertainty.forward import forward_passes
from simulator.workload import WorkloadBatch

STACK = "vllm"
DATE = "2026-12-02"  # of the fit
SAMPLER_S = 0.42e-9  # per entry of the vocabulary and sequence (simulator/engines/vllm.yaml)
PROMPT_TOKENS = 4096  # of the prefills, which a step of 8,192 tokens holds beside decodes


@dataclass(frozen=True)
class Servers:
    """Runs on one GPU: the work of a mean step, its measured time, and the mean power."""

    hw: HardwareProfile
    rows: Sequence[Row]
    work: Work  # (runs, 1)
    sampler: FloatArray  # share of the time in which the sampler sorts
    watts: FloatArray  # of one GPU

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Servers:
        hw = load_hardware(rows[0]["hardware"])
        parts = [_work(row, hw) for row in rows]
        joined = Work(*(np.concatenate(part) for part in zip(*parts)))
        sampler = [
            SAMPLER_S * load_model(row["model"]).vocab * float(row["batch"]) / _devices(row)
            for row in rows
        ]
        watts = np.array([float(row["watts"]) for row in rows])
        return cls(hw, rows, joined, np.array(sampler) / joined.time[:, 0], watts)

    def take(self, which: BoolArray) -> Servers:
        return Servers(
            self.hw,
            [row for row, used in zip(self.rows, which) if used],
            Work(*(part[which] for part in self.work)),
            self.sampler[which],
            self.watts[which],
        )

    def fit(self) -> tuple[Section, float]:
        return fit_power(self.hw, self.work, self.watts, _provenance(self.rows), self.sampler)

    def predicted(self, section: Section, further: float) -> tuple[FloatArray, FloatArray]:
        """Return predicted powers, W, and the standard deviations of their logs."""
        power = Power.of(replace(self.hw, sections={**self.hw.sections, ("power", "*"): section}))
        joules = power.joules(self.work)[..., 0]
        beside = further * self.hw.power_w * self.sampler
        total = joules.sum(axis=0) / self.work.time[:, 0] + beside
        share = joules / np.maximum(total * self.work.time[:, 0], 1e-300)
        return np.minimum(total, self.hw.power_w), np.sqrt(
            np.square(share * power.log_sd[:, None]).sum(axis=0)
        )


def _devices(row: Row) -> int:
    """Return over how many devices the sampler's work is divided: each tensor-parallel device
    samples all sequences."""
    return int(row["devices"]) if row["parallel"] else 1


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


def write_sections() -> list[str]:
    """Write the fitted sections into the stack files of vLLM, and return a line for each."""
    lines = []
    for name, runs in servers().items():
        section = rounded(runs.fit()[0])
        sections = {**load_hardware(name).stacks[STACK], ("power", "*"): section}
        path = profiles_folder() / f"{name}.{STACK}.yaml"
        save_stack(runs.hw.calibrated(sections), STACK, path)
        values = ", ".join(f"{part} {one.value:g}" for part, one in section.constants.items())
        lines.append(f"{name}: {values} of {runs.hw.power_w:g} W, {len(runs.rows)} runs")
    return lines


def _provenance(rows: Sequence[Row]) -> Provenance:
    return Provenance(
        source="ml-energy/leaderboard@0cd52dab (ML.ENERGY 3.0)",
        digest=hashlib.sha256(PUBLISHED["steady"].read_bytes()).hexdigest(),
        date=DATE,
        software="vLLM 0.11.1",
        device=rows[0]["hardware"],
        protocol="mean power of all GPUs in a steady state",
        rows=len(rows),
    )


def servers() -> Mapping[str, Servers]:
    """Return the runs by GPU. Runs with expert parallelism are left out: their devices wait for
    each other for a time that no row states."""
    rows = [row for row in published("steady") if not row["parallel"]]
    names = dict.fromkeys(row["hardware"] for row in rows)
    return {name: Servers.of([r for r in rows if r["hardware"] == name]) for name in names}


def held_out(runs: Servers) -> tuple[FloatArray, FloatArray]:
    """Return predicted powers by fits without the runs of the same model, and the standard
    deviations of their logs."""
    models = np.array([load_model(row["model"]).name for row in runs.rows])
    predicted, deviation = np.zeros((2, len(models)))
    for model in dict.fromkeys(models.tolist()):
        same = models == model
        found = runs.take(~same).fit()
        predicted[same], deviation[same] = runs.take(same).predicted(*found)
    return predicted, deviation
