"""Time to an answer: warm in one process, and cold from the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.cli import run
from simulator.figures.paper import FIGURES

Floor = Callable[..., None]
DEVICES = ["a100_sxm_80gb", "h100_sxm", "rtx_4090"]


def cold(arguments: Sequence[str], runs: int = 10) -> float:
    """Median wall time of a fresh process, s."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def test_a_whole_model_speedup(benchmark: Any, floor: Floor) -> None:
    """Prune and compare, prefill and decode of Llama-3.1-8B, one family; lowering is cached as in
    any search."""
    hw, model = simulator.load_hardware("h100_sxm"), simulator.load_model("llama-3.1-8b")
    dense = [
        simulator.lower(model, phase=phase, batch=1, seq=2048) for phase in ("prefill", "decode")
    ]

    def both() -> list[float]:
        return [simulator.speedup(d, simulator.prune(d, "width", 0.25), hw).speedup for d in dense]

    assert min(benchmark(both)) > 1.0
    floor("milliseconds a phase", 1e3 * benchmark.stats["median"] / 2, 1.0, False)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_speedup_table(benchmark: Any, phase: str, floor: Floor) -> None:
    """Three GPUs, eleven families, three sparsities, one phase: what ``prunesim speedup`` prints by
    default."""
    case = (["llama-3.1-8b"], DEVICES, ["all"], (0.1, 0.25, 0.5), (phase,), (1,), (2048,))
    table = benchmark(simulator.table, *case, engine=["reference"])
    assert len(table) == 3 * 31
    floor(f"milliseconds, {phase}", 1e3 * benchmark.stats["median"], 50.0, False)


def test_all_figures_of_a_paper(benchmark: Any, floor: Floor, tmp_path: Path) -> None:
    status = benchmark.pedantic(run, (["figures", "-o", str(tmp_path)],), rounds=1)
    assert status == 0
    # which needs a measured table
    assert {p.stem for p in tmp_path.glob("*.pdf")} == set(FIGURES) - {"scatter"}
    floor("seconds for all figures of a paper", benchmark.stats["min"], 60.0, False)


@pytest.mark.parametrize(
    ("what", "line", "limit_s"),
    [
        ("to import simulator", "-c import\tsimulator", 0.25),
        ("for prunesim gemm", "-m simulator.cli gemm 4096 4096 4096 --hardware h100", 0.5),
        ("for prunesim --help", "-m simulator.cli --help", 0.5),
        (
            "for prunesim speedup",
            f"-m simulator.cli speedup llama-3.1-8b --phase prefill --hardware {','.join(DEVICES)}",
            1.0,
        ),
    ],
)
def test_cold_start(what: str, line: str, limit_s: float, floor: Floor) -> None:
    floor(f"seconds {what}, cold", cold(line.split(" ")), limit_s, False)
