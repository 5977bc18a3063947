"""From records to the arrays and labels that figures take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.predict.gemms import GemmRecord
    from simulator.predict.rows import Record
    from simulator.predict.table import Explanation

# imported late by the commands: these functions need matplotlib


def setting_label(r: Record) -> str:
    """A short label of phase (with the new tokens of a generate) and batch."""
    return f"{r.phase}{f' {r.new_tokens}' if r.phase == 'generate' else ''}, batch {r.batch}"


def draw_speedups(records: Sequence[Record], path: str) -> None:
    """Speedup against sparsity for a table of records."""
    from simulator.figures.save import save_figure
    from simulator.figures.speedup import speedup_figure

    lengths = len({r.seq for r in records}) > 1
    models = len({r.model for r in records}) > 1
    rows = [
        (f"{r.model}, " if models else "") + setting_label(r) + (f", seq {r.seq}" if lengths else "") for r in records
    ]
    figure = speedup_figure(
        rows,
        [r.hardware for r in records],
        [r.family for r in records],
        [r.sparsity for r in records],
        [r.speedup for r in records],
        [r.speedup_lower for r in records],
        [r.speedup_upper for r in records],
        {"FLOP bound": [r.flop_bound for r in records], "roofline bound": [r.roofline_bound for r in records]},
        interval=f"{100 * records[0].level:.4g} % interval",
    )
    save_figure(figure, path)


def draw_waterfalls(found: Sequence[Explanation], path: str) -> None:
    """The loss waterfalls of explanations, a panel each."""
    from simulator.figures.panels import steps_of
    from simulator.figures.save import save_figure
    from simulator.figures.waterfall import waterfall_figure

    several = len({(e.record.phase, e.record.batch, e.record.seq) for e in found}) > 1
    lengths = len({e.record.seq for e in found}) > 1
    panels = [
        steps_of(
            e,
            e.record.hardware
            + (f"\n{setting_label(e.record)}" if several else "")
            + (f", seq {e.record.seq}" if lengths else ""),
        )
        for e in found
    ]
    save_figure(waterfall_figure(panels, columns=_columns(found)), path)


def _columns(found: Sequence[Explanation]) -> int | None:
    """Panels in a row: the devices, where there are two or three of them."""
    devices = len({e.record.hardware for e in found})
    return devices if devices in (2, 3) else None


def draw_rooflines(found: Sequence[Explanation], path: str) -> None:
    """Dense and pruned GEMMs of explanations on the roofline, a panel each."""
    from simulator.figures.panels import roof_of
    from simulator.figures.roofline import roofline_figure
    from simulator.figures.save import save_figure

    several = len({(e.record.phase, e.record.batch, e.record.seq) for e in found}) > 1
    roofs = [roof_of(e, e.record.hardware + (f"\n{setting_label(e.record)}" if several else "")) for e in found]
    save_figure(roofline_figure(roofs, columns=_columns(found)), path)


def draw_gemms(rows: Sequence[GemmRecord], path: str) -> None:
    """Single GEMMs on the roofline, a panel a device."""
    from simulator.figures.roofline import Roof, roofline_figure
    from simulator.figures.save import save_figure

    roofs = []
    for name in dict.fromkeys(r.hardware for r in rows):
        own = [r for r in rows if r.hardware == name]
        roofs.append(
            Roof(
                name,
                own[0].peak_flop_per_s,
                own[0].bandwidth_bytes_per_s,
                [f"{r.m} x {r.n} x {r.k}" for r in own],
                [r.intensity for r in own],
                [r.flop_per_s for r in own],
                [False] * len(own),
            )
        )
    save_figure(roofline_figure(roofs), path)
