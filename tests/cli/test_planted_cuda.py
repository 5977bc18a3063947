"""Whole commands on planted GPUs: what a calibration recovers, and what is reported when something
goes wrong.

Each case runs once per session; the tests read what it printed and wrote.
``golden/planted_cuda.txt`` has a line per case. Where a change is meant to move a line,
``PRUNESIM_GOLDEN=write python -m pytest tests/cli/test_planted_cuda.py`` rewrites the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import re
import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

from decoder_reference import CONFIG
from fakes.gpu import GPUS, NO_TROUBLES, POWER, Kernel, Troubles
from fakes.torch_cuda import installed

from calibration.devices import open_device
from calibration.devices.protocol import Operator
from calibration.records.store import read_store
from calibration.runners.decoder import timing
from calibration.runners.decoder.families import prune_decoder
from calibration.runners.decoder.model import random_decoder
from simulator.cli import run
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.uncertainty.operators import gemm_time

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "planted_cuda.txt"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

MODEL = "llama-3.1-8b --device cuda --layers 2 --seq 256 --sparsity 0.5"
PROBES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "arithmetic": ((2048, 4096, 8192), (4096, 6144, 8192), (4096, 8192)),
    "bandwidth": ((1, 4), (8192, 14336, 16384), (8192, 16384)),
    "launch": ((1, 4, 16), (64, 128, 256), (64, 128, 256)),
}
"""Values of m, n and k of GEMMs whose times are nearly one planted constant each."""
TOLERANCE = {"arithmetic": 0.1, "bandwidth": 0.05, "launch": 0.2}
"""The fitted model has waves of tiles, which the planted arithmetic has not."""


@dataclass(frozen=True)
class Planted:
    """A case: commands on a GPU, each in a new process as far as torch is concerned, into one
    folder."""

    gpu: str
    commands: tuple[str, ...]
    troubles: Troubles = NO_TROUBLES  # troubles of the first command
    later: Troubles | None = None  # troubles of the other commands, if they differ


BOUND = (f"upper-bound {MODEL} -o RUN --family width,depth --budget 60s",)
COMPARE = f"compare {MODEL} -o RUN --family width,depth,low_rank --budget 30s"
CALIBRATE, MEASURE = (
    ("calibrate cuda -o RUN --engine none --budget 50s",),
    ("calibrate cuda -o RUN --measure-only --budget 12s",),
)
CALIBRATED = ("H100", "RTX 4090", "A100 3g.40gb", "B200")
CASES: Mapping[str, Planted] = {
    **{name: Planted(name, CALIBRATE) for name in CALIBRATED},
    "T4": Planted("T4", ("calibrate cuda -o RUN --measure-only --dtype fp16 --budget 60s",)),
    "laptop": Planted("RTX 4090 laptop", MEASURE * 2),
    "one command": Planted("H100", ("calibrate cuda -o RUN --budget 60s",)),
    "bound": Planted("H100", BOUND),
    "compare": Planted("H100", (*CALIBRATE, COMPARE)),
    # too short for energies, because each eager pass takes real time
    "compare hf": Planted(
        "H100", (*CALIBRATE, f"{COMPARE.replace('30s', '15s')} --engine hf --phase prefill")
    ),
    "compare lost": Planted("H100", (COMPARE,), Troubles(lost_at_s=0.3)),
    "compare too large": Planted("H100", (COMPARE,), Troubles(memory_bytes=100e6)),
    "noise": Planted("H100", MEASURE, Troubles(noise=0.05)),
    "drift": Planted("H100", MEASURE, Troubles(drift_per_s=0.01)),
    "power cap": Planted("H100", MEASURE, Troubles(power_cap=0.75)),
    "throttling": Planted("H100", MEASURE, Troubles(throttle=(4.0, 6.0))),
    "throttling throughout": Planted("H100", MEASURE, Troubles(throttle=(0.0, 1e9))),
    "lost": Planted("H100", MEASURE, Troubles(lost_at_s=6.0)),
    "refused": Planted(
        "H100",
        (f"upper-bound {MODEL} -o RUN --family depth --budget 10s",),
        Troubles(refused=(4096, 4096)),
    ),
    "capture": Planted(
        "H100", MEASURE * 3, Troubles(uncapturable=("scaled_dot_product_attention",))
    ),
    "late capture": Planted("H100", MEASURE * 2, Troubles(capture_fails_at_s=4.0), NO_TROUBLES),
    "out of memory": Planted("H100", MEASURE, Troubles(memory_bytes=100e6)),
    "no NVML": Planted("H100", MEASURE, Troubles(nvml=False)),
}


@dataclass(frozen=True)
class Ended:
    """What the last command of a case returned, printed and wrote."""

    statuses: tuple[int, ...]
    out: str
    notes: str
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Measurements, without drift checks."""
        found = read_store(self.folder / "records.jsonl").rows
        return [row for row in found if row["purpose"] not in ("drift_check", "sustained")]

    @property
    def profile(self) -> HardwareProfile:
        return load_hardware(self.folder / "profile.yaml")

    def counts(self) -> Counter[str]:
        return Counter(row["status"] for row in self.rows)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, three_folds: None) -> Callable[[str], Ended]:
    """Return what a case ended with; each case runs once."""
    found: dict[str, Ended] = {}

    def ended(name: str) -> Ended:
        if name not in found:
            case, folder, statuses = (
                CASES[name],
                tmp_path_factory.mktemp("planted") / "run",
                list[int](),
            )
            # as the case of the GPU itself
            if case.commands[:-1] == CALIBRATE and case.troubles == NO_TROUBLES:
                statuses += ended(case.gpu).statuses
                shutil.copytree(ended(case.gpu).folder, folder)
            for number, command in list(enumerate(case.commands))[len(statuses) :]:
                troubles = case.later if number and case.later is not None else case.troubles
                out, notes = io.StringIO(), io.StringIO()
                words = [str(folder) if word == "RUN" else word for word in shlex.split(command)]
                printed = contextlib.redirect_stdout(out), contextlib.redirect_stderr(notes)
                with printed[0], printed[1], installed(case.gpu, troubles):
                    statuses.append(run(words))
                assert "Traceback" not in notes.getvalue()
            found[name] = Ended(tuple(statuses), out.getvalue(), notes.getvalue(), folder)
        return found[name]

    return ended


def planted_s(name: str, m: int, n: int, k: int) -> float:
    """Return the planted time of a GEMM on a GPU without troubles."""
    gpu, op = GPUS[name], Operator("gemm", m=m, n=n, k=k)
    return gpu.floor_s + Kernel(
        "linear", op.flops / gpu.flop_per_s, op.bytes / gpu.bytes_per_s
    ).seconds(1.0)


def errors(name: str, profile: HardwareProfile) -> dict[str, float]:
    """Return the median relative errors of a profile where one planted constant of a GPU
    decides."""
    found = {}
    for what, sizes in PROBES.items():
        m, n, k = (axis.ravel() for axis in np.meshgrid(*sizes))
        true = np.array(
            [
                planted_s(name, *shape)
                for shape in zip(m.tolist(), n.tolist(), k.tolist(), strict=True)
            ]
        )
        found[what] = float(np.median(gemm_time(m, n, k, profile).seconds / true)) - 1.0
    return found


@pytest.mark.parametrize("name", CALIBRATED)
def test_planted_constants_are_recovered(ended: Callable[[str], Ended], name: str) -> None:
    done = ended(name)
    # as the verdict says
    assert done.statuses == (int(done.out.startswith("Do not ")),), done.notes
    found = errors(name, done.profile)
    assert all(abs(error) < TOLERANCE[what] for what, error in found.items()), found
    assert {
        row["after"]["throttle"] == "unknown" for row in done.rows if row["status"] == "ok"
    } == {GPUS[name].mig}


def test_a_decoder_on_a_planted_gpu_is_as_fast_as_predicted(ended: Callable[[str], Ended]) -> None:
    done = ended("compare")
    assert done.statuses == (0, 0), done.notes
    assert f"llama-3.1-8b on {GPUS['H100'].name}" in done.out.replace("\n", " ")
    rows = list(csv.DictReader((done.folder / "comparison.csv").read_text().splitlines()))
    assert {(row["family"], row["phase"]) for row in rows} == set(
        itertools.product(("depth", "width", "low_rank"), ("prefill", "decode"))
    )
    assert statistics.median(abs(float(row["error"])) for row in rows) < 0.05


def test_planted_powers_are_found_again(ended: Callable[[str], Ended]) -> None:
    gpu, hw = GPUS["H100"], ended("H100").profile
    section = hw.section("power", "*")
    assert section.provenance is not None
    assert section.provenance.protocol == "power: mean of 1 s by an energy counter"
    # planted at the achieved rates, fitted at those of the datasheet
    achieved = {"memory": gpu.bytes_per_s / hw.bandwidth_bytes_per_s}
    achieved["compute"] = gpu.flop_per_s / hw.rates["bf16"].flop_per_s
    # 50 s give four powers, which the prior supports
    for part, near in (("idle", 0.05), ("memory", 0.25), ("compute", 0.25)):
        assert section[part] * achieved.get(part, 1.0) == pytest.approx(POWER[part], rel=near)
    assert ended("A100 3g.40gb").profile.section("power", "*").status == "default"


def test_energies_of_passes_are_counted_if_there_is_time() -> None:
    with installed("H100"):
        device = open_device("cuda")
        dense = random_decoder(CONFIG, dtype="bf16", device="cuda")
        case = dense, prune_decoder(dense, "depth", 0.5), Mock(batch=1, seq=64, phase="decode")
        found = timing.time_pair(*case, "cuda_graph", 20.0, device)
        assert "dense_j" not in timing.time_pair(*case, "cuda_graph", 5.0, device)
    for model in ("dense", "pruned"):
        joules, seconds = found[f"{model}_j"], statistics.median(found[f"{model}_s"])
        assert len(joules) == 3
        for each in joules:
            assert 0.2 * 700.0 < each / seconds < 0.97 * 700.0
        assert max(joules) < 1.1 * min(joules)
    assert max(found["pruned_j"]) < min(found["dense_j"])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["", "token", "kv_cache"])
def test_a_captured_pass_is_one_launch(family: str, phase: str) -> None:
    with installed("H100") as cuda:
        dense = random_decoder(CONFIG, dtype="bf16", device="cuda")
        pruned = prune_decoder(dense, family, 0.5) if family else dense
        sample = timing.sampler(pruned, Mock(batch=1, seq=64, phase=phase), "cuda_graph")
        with cuda.watched() as launches:
            sample(5)
    assert len(launches) == 5


@pytest.mark.parametrize(("phase", "batch"), [("prefill", 2), ("decode", 1), ("decode", 4)])
def test_the_decoder_runs_the_fused_kernels_that_calibrations_time(phase: str, batch: int) -> None:
    with installed("H100") as cuda:
        dense = random_decoder(CONFIG, dtype="bf16", device="cuda")
        sample = timing.sampler(dense, Mock(batch=batch, seq=64, phase=phase), "eager")
        with cuda.watched() as launches:
            sample(1)
    found, layers = (
        Counter(kernel.name for kernels in launches for kernel in kernels),
        len(dense.layers),
    )
    assert (found["_rotary"], found["_gated"], found["silu"], found["addcmul"]) == (
        2 * layers,
        layers,
        0,
        0,
    )


def test_random_bases_of_low_rank_are_made_on_the_device() -> None:
    with installed("H100") as cuda:
        dense = random_decoder(CONFIG, dtype="bf16", device="cuda")
        with cuda.watched() as launches:
            prune_decoder(dense, "low_rank", 0.5)
    made = sum(kernel.name == "randn" for kernels in launches for kernel in kernels)
    assert made == len(list(dense.projections()))


def test_transformers_runs_on_a_planted_gpu(ended: Callable[[str], Ended]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = ended("compare hf")
    assert done.statuses == (0, 0), done.notes
    rows = list(csv.DictReader((done.folder / "comparison.hf.csv").read_text().splitlines()))
    assert {row["family"] for row in rows} == {"depth", "width", "low_rank"}
    assert all(float(row["measured"]) > 1.0 for row in rows)


def test_one_command_ends_with_a_pruned_model_and_whether_to_trust(
    ended: Callable[[str], Ended],
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = ended("one command")
    assert done.statuses == (0,), done.notes
    out = " ".join(done.out.split())
    assert "llama-3.1-8b in Transformers, eager, dense and pruned" in out
    last = out[out.index(f"Trust {done.folder}") :]
    assert "gained what it predicts" in last
    assert "experts from h100_sxm for trtllm" in last
    assert "status: hf: 8 layers of llama-3.1-8b, dense and pruned" in done.notes


PLAIN_ATTENTION = ("attention_prefill", "attention_decode")


def test_kinds_that_cannot_be_captured_cost_a_process_each(ended: Callable[[str], Ended]) -> None:
    done = ended("capture")
    assert done.statuses == (1, 1, 0)
    failed = [row["operator"]["kind"] for row in done.rows if row["status"] == "unsupported"]
    assert sorted(failed) == sorted(PLAIN_ATTENTION)
    assert not {*PLAIN_ATTENTION} & {r["operator"]["kind"] for r in done.rows if "method" in r}


def test_a_gpu_that_always_throttles_is_measured_and_a_laptop_resumes(
    ended: Callable[[str], Ended],
) -> None:
    assert ended("T4").statuses == (0,), ended("T4").notes
    steady = ended("T4").rows
    assert sum("steady" in row for row in steady) > 0.8 * len(steady) > 20
    # its enforced power limit has moved between the two runs
    assert ended("laptop").statuses == (0, 0), ended("laptop").notes


def test_a_spoiled_process_measures_nothing_more_and_the_next_one_resumes(
    ended: Callable[[str], Ended],
) -> None:
    done = ended("late capture")
    assert done.statuses == (1, 0)
    spoiled = [row for row in done.rows if row["status"] == "unsupported"]
    assert len(spoiled) == 1
    assert "not capturable" in spoiled[0]["reason"]
    rest = [row for row in done.rows if "method" in row and "host clock" not in row["method"]]
    assert {_method(row) for row in rest} == {"events around a graph"}
    assert len(rest) > 40


def _method(row: Mapping[str, Any]) -> str:
    """The beginning of a method, up to numbers and details."""
    return re.split(r" of \d| after |,|;", row["method"])[0]


def line_of(name: str, done: Ended) -> str:
    """Return a case, its exit statuses, what its last command concludes and notes, and errors of
    planted constants."""
    case = CASES[name]
    planted = {
        field.name
        for field in fields(Troubles)
        if getattr(case.troubles, field.name) != field.default
    }
    what = (
        ", ".join(f"{field} {getattr(case.troubles, field)}" for field in sorted(planted))
        or "nothing"
    )
    first = re.split(r": |\n\n", done.out.replace(str(done.folder), "RUN"))[0].replace("\n", " ")
    parts = [f"planted: {what}", f"exit {' '.join(map(str, done.statuses))}"]
    if (done.folder / "records.jsonl").exists():
        parts.append("rows " + ", ".join(sorted(done.counts())))
    parts += [first] if first not in ("", "RUN/records.jsonl") else []
    # else notes of a fit
    if "--measure-only" in case.commands[-1] or not case.commands[-1].startswith("calibrate"):
        parts += sorted(
            {
                _plain(note)
                for note in re.findall(r"^(?:note|prunesim): (.*)", done.notes, re.MULTILINE)
            }
        )
    if (done.folder / "profile.yaml").exists():
        off = errors(case.gpu, done.profile)
        parts.append(
            "constants "
            + ", ".join(f"{what} {round(100 * error):+d} %" for what, error in off.items())
        )
    return f"{name} ({case.gpu}): " + " | ".join(parts)


OPERATORS = re.compile(r"\b\w+ \w+ (cold|hot)( \w+=[\w.]+)+(, | and \d+ more)?")


def _plain(note: str) -> str:
    """A note without operators and numbers, which follow from the order of a plan."""
    return re.sub(r"[+-]?\d[\d.,]*", "#", OPERATORS.sub("", note))[:160]


def test_the_campaign_reports_what_was_planted(ended: Callable[[str], Ended]) -> None:
    text = "".join(f"{line_of(name, ended(name))}\n" for name in CASES)
    if os.environ.get("PRUNESIM_GOLDEN") == "write":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
