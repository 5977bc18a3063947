"""``prunesim pareto``: find the frontier of speedup and quality loss, and the fastest family at
each quality budget."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from simulator.cli import options, parsing, render
from simulator.cli.options import option
from simulator.display import as_plain
from simulator.units import parse_fraction

if TYPE_CHECKING:
    from simulator.prediction.pareto import Band, Front
    from simulator.prediction.quality import Axis, QualityTable


MOST_SHOWN = 1000  # models of a table; of more, those on the frontier


@dataclass(frozen=True)
class Quality:
    quality: str | None = option("FILE", "Quality table, or list of lm-evaluation-harness results.")
    metric: str = option("NAME", "Metric, or a part of its name.", "")
    protocol: str = option("NAME", "Protocol, or a part of its name.", "")
    quality_model: str | None = option("NAME", "Use the quality rows of this model instead.")


@options.expanded(
    "weight_dtype", "kv_dtype", "dense_s", "dense_tokens_per_s", "dense_from", "ideal"
)
def pareto(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    rows: Quality = Quality(),
    measured: str | None = option("FILE", "CSV of measured speedups to use."),
    max_loss: str | None = option("FRACTION", "Name the fastest model with at most this loss."),
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    """Show the frontier of speed and quality.

    No other model beats those on the frontier in both. Begins with them and the best trade, the
    most speedup per loss, or with the fastest model within --max-loss. Quality is measured, on one
    metric under one protocol: by papers (the shipped tables, the default), in your table, or by
    lm-evaluation-harness (a CSV with the columns results, family, sparsity). Speed is predicted,
    unless --measured has a value.
    """
    out.check()
    from simulator.models.library import load_model
    from simulator.prediction.notes import uncalibrated
    from simulator.prediction.pareto import fronts, read_measured
    from simulator.prediction.pareto_sentences import of_fronts
    from simulator.prediction.quality import choose_axis, load_quality
    from simulator.prediction.wording import MOST_SENTENCES

    config = load_model(model)
    table = load_quality(rows.quality).of_model(rows.quality_model or config.name)
    axis = choose_axis(table, rows.metric, rows.protocol, strict=rows.quality is not None)
    known = read_measured(measured) if measured else ()
    most = None if max_loss is None else parsing.checked("--max-loss", max_loss, parse_fraction)
    asked = run.asked(model, devices)
    found, notes = fronts(config, devices.profiles, table, axis, measured=known, **asked.settings)
    records = [{**as_plain(f), "axis": str(f.axis)} for f in (found if out.json else ())]
    if out.write(records, [vars(p) for f in found for p in f.points]):
        render.conclude(*of_fronts(found, most))
        if out.verbose or len(found) <= MOST_SENTENCES:
            for front in found:
                print(_front_text(front), end="\n\n")
            print(
                "optimal: no other point is as fast at no more loss (*: with the whole interval"
                " over other families)"
            )
        else:
            _show_trades(found)
    if out.figure:
        from simulator.figures.pareto import fronts_of

        out.draw(lambda: fronts_of(found))
    lines = list(asked.notes)
    if table.models[0] != config.name.lower():
        lines.append(f"quality: measured on {table.models[0]}; speed: predicted for {config.name}")
    lines += [*uncalibrated(found), *notes]
    if out.verbose and not out.json and out.csv != "-":
        lines += _other_axes(table, axis)
    render.notes(lines, out.verbose)


def _other_axes(table: QualityTable, axis: Axis) -> list[str]:
    others = [str(other) for other in table.axes() if other != axis]
    shown = "; ".join(others[:4]) + (" ..." if len(others) > 4 else "")
    note = f"other axes of {table.models[0]}, chosen by --metric and --protocol: {shown}"
    return [note] if others else []


def _show_trades(found: Sequence[Front]) -> None:
    from simulator.prediction.pareto_sentences import best_trade

    trades = [(front, best_trade(front)) for front in found]
    columns = render.columns(
        trades,
        ("<hardware", lambda row: row[0].hardware),
        ("<engine", lambda row: row[0].engine),
        ("<request", lambda row: f"{row[0].phase} {row[0].batch} x {row[0].seq}"),
        ("on the\nfrontier", lambda row: sum(p.optimal for p in row[0].points)),
        ("<best trade", lambda row: row[1].name if row[1] else "none is faster"),
        ("speedup", lambda row: render.interval(row[1]) if row[1] else "-"),
        ("loss", lambda row: render.percent(row[1].loss) if row[1] else "-"),
    )
    render.show(columns, f"best trade by {found[0].axis}")


def _front_text(front: Front) -> str:
    columns = render.first_fitting(_columns(front, detail) for detail in (3, 2, 1, 0))
    where = (
        f"{front.model}, {front.hardware}, {front.phase}, batch {front.batch}, seq {front.seq},"
        f" {front.engine}"
    )
    if len(front.points) > MOST_SHOWN:
        where += f"\n{len(front.points):,} models, shown on the frontier"
    table = render.table_text(columns, f"{where}\n{front.axis}", color=render.colored())
    sentences = "; ".join(_band_text(b) for b in front.bands)
    sources = "; ".join(dict.fromkeys(p.source for p in front.points))
    named = any(c.title == "source" for c in columns)
    cited = "" if named else "\n" + textwrap.fill(f"source: {sources}", render.width())
    bands = textwrap.fill(
        f"fastest family by quality budget: {sentences}", render.width(), break_on_hyphens=False
    )
    return f"{table}{cited}\n\n{bands}"


def _band_text(band: Band) -> str:
    """Return a band as text, as in the paper."""
    low, high = f"{100 * band.low:.3g}", f"{100 * band.high:.3g}"
    budget = f"from {low} %" if math.isinf(band.high) else f"{low}-{high} %"
    speeds = list(dict.fromkeys(f"{s:.2f}" for s in (band.speedup_low, band.speedup_high)))
    return f"{budget} {band.family} ({'-'.join(speeds)}x{'' if band.sure else ', uncertain'})"


def _columns(front: Front, detail: int) -> list[render.Column]:
    """Return the table with sources (detail 3), without them (2), without the points that beat
    others (1), and without intervals (0)."""
    points = front.points
    if len(points) > MOST_SHOWN:
        points = tuple(p for p in points if p.optimal)
    shown = render.columns(
        points,
        ("<method", "method"),
        ("<family", "family"),
        ("pruned", "sparsity", render.percent),
        ("loss", "loss", render.percent),
        ("speedup", render.interval if detail else lambda p: render.ratio(p.speedup)),
        ("<optimal", lambda p: "yes *" if p.sure else "yes" if p.optimal else ""),
        ("<speed", lambda p: "measured" if p.measured else "predicted"),
        ("<beaten by", "beaten_by"),
        ("<source", "source"),
    )[: (7, 7, 8, 9)[detail]]
    if not any(p.measured for p in points):
        del shown[6:7]
    dense = {"method": "dense", "loss": "0 %", "speedup": "1.00"}
    return [replace(c, cells=[dense.get(c.title, ""), *c.cells]) for c in shown]
