"""Draw the predictions of commands as figures. The functions need matplotlib, so commands import them late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simulator.figures.panels import fronts_of, rooflines_of, services_of, speedups_of, waterfalls_of
from simulator.figures.plan import plan_figure
from simulator.figures.roofline import Roof, roofline_figure
from simulator.figures.save import save_figure
from simulator.figures.titles import device_title
from simulator.prediction.scenario import batch_name

if TYPE_CHECKING:
    from simulator.plans.search import Plan
    from simulator.prediction.explain import Explanation
    from simulator.prediction.gemms import GemmRecord
    from simulator.prediction.pareto import Front
    from simulator.prediction.result import Result
    from simulator.prediction.service import Service


def draw_speedups(results: Sequence[Result], path: str) -> None:
    """Draw speedups over batch, length or sparsity, whichever varies."""
    save_figure(speedups_of(results), path)


def draw_services(found: Sequence[Service], path: str) -> None:
    """Draw the throughput of services over their time per token, one panel each."""
    save_figure(services_of(found), path)


def draw_fronts(found: Sequence[Front], path: str) -> None:
    """Draw frontiers, one panel each."""
    lengths = len({f.seq for f in found}) > 1
    names = [f"{f.phase}, {batch_name(f.phase)} {f.batch}" + (f", seq {f.seq}" if lengths else "") for f in found]
    save_figure(fronts_of(found, names), path)


def draw_waterfalls(found: Sequence[Explanation], path: str) -> None:
    """Draw the waterfalls of explanations, one panel each."""
    save_figure(waterfalls_of(found), path)


def draw_rooflines(found: Sequence[Explanation], path: str) -> None:
    """Draw dense and pruned GEMMs of explanations on the roofline, one panel each."""
    save_figure(rooflines_of(found), path)


def draw_plan(plan: Plan, path: str) -> None:
    """Draw the layers of a plan, and its frontier."""
    save_figure(plan_figure(plan), path)


def draw_gemms(rows: Sequence[GemmRecord], path: str) -> None:
    """Draw single GEMMs on the roofline, one panel per device."""
    roofs = []
    for name in dict.fromkeys(r.hardware for r in rows):
        own = [r for r in rows if r.hardware == name]
        names = [f"{r.m} × {r.n} × {r.k}" for r in own]
        points = [r.intensity for r in own], [r.flop_per_s for r in own], [False] * len(own)
        first = own[0]
        peaks = first.peak_flop_per_s, first.bandwidth_bytes_per_s
        roofs.append(Roof(device_title(name), *peaks, names, *points, headroom=first.clock_headroom))
    warm = "" if rows[0].cold else " (weights from the L2 cache: the memory slope is not a bound)"
    save_figure(roofline_figure(roofs, names=f"M × N × K{warm}"), path)
