"""``prunesim pareto``: speedups against quality loss, the frontier, and the family that is fastest at each quality budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.predict.pareto import Band, Front, Point
    from simulator.predict.quality import QualityTable

Quality = Annotated[
    str | None, typer.Option("--quality", metavar="FILE", help="Quality table (CSV), or the name of a shipped one.")
]
QualityModel = Annotated[
    str | None, typer.Option("--quality-model", metavar="NAME", help="Take the quality rows of this model instead.")
]


def pareto(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of a model, or its Hugging Face config.json (file or folder).")
    ],
    hardware: options.Hardware,
    quality: Quality = None,
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="Metric, or a part of its name.")] = "",
    protocol: Annotated[str, typer.Option("--protocol", metavar="NAME", help="Protocol, or a part of its name.")] = "",
    quality_model: QualityModel = None,
    measured: Annotated[
        str | None, typer.Option("--measured", metavar="FILE", help="CSV of measured speedups to use.")
    ] = None,
    phase: options.Phase = "prefill",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    new_tokens: options.NewTokens = 128,
    runtime: options.Runtime = "cuda_graph",
    dtype: options.Dtype = "bf16",
    devices: options.Devices = 1,
    parallel: options.Parallel = "tensor",
    json: options.Json = False,
    csv: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write the points as CSV (- for standard output).")
    ] = None,
    figure: options.Figure = None,
) -> None:
    """Show which pruned models no other one beats in speed and quality.

    Quality is measured by papers or by prunesim quality, on one metric under one protocol; speed is predicted, or measured where
    --measured has it. Without --quality the shipped rows of the model are used.
    """
    if json and csv:
        raise InputError("--json and --csv: expected one of them")
    if figure:
        from simulator.figures.save import check_figure

        check_figure(figure)
    if csv and csv != "-":
        from simulator.files.write import check_target

        check_target(csv)
    from simulator.models.library import load_model
    from simulator.predict.pareto import fronts, read_measured
    from simulator.predict.quality import choose_axis

    config = load_model(model)
    table = quality_rows(quality, quality_model or config.name)
    axis = choose_axis(table, metric, protocol, strict=quality is not None)
    found, notes = fronts(
        config,
        options.names("--hardware", hardware),
        table,
        axis,
        options.names("--phase", phase),
        options.integers("--batch", batch),
        options.integers("--seq", seq),
        setting=options.setting(new_tokens, runtime, dtype, None, None, devices, parallel),
        measured=read_measured(measured) if measured else (),
    )
    points = [asdict(p) for f in found for p in f.points]
    if json:
        records = [
            {**asdict(f), "axis": str(f.axis), "points": _finite(f.points), "bands": _finite(f.bands)} for f in found
        ]
        print(render.json_lines(records))
    elif csv == "-":
        print(render.csv_text(points), end="")
    elif csv:
        from simulator.files.write import write_whole

        write_whole(csv, render.csv_text(points).encode())
    else:
        for front in found:
            print(front_text(front), end="\n\n")
        print("optimal: no other point is as fast at no more loss (*: also at the unfavourable ends of the intervals)")
    if figure:
        draw_fronts(found, figure)
    for line in notes:
        render.note(line)
    others = [str(a) for a in table.axes() if a != axis]
    if others and not json and csv != "-":
        render.note(
            f"other axes of {table.models[0]} (--metric, --protocol): {'; '.join(others[:4])}{' ...' if len(others) > 4 else ''}"
        )
    if table.models[0] != config.name.lower():
        render.note(f"quality is that of {table.models[0]}, speed that of {config.name}")
    uncalibrated = list(dict.fromkeys(f.hardware for f in found if not f.calibrated))
    if uncalibrated:
        render.note(
            f"{', '.join(uncalibrated)}: not calibrated for everything this needs; the intervals are wide for it"
        )


def quality_rows(quality: str | None, model: str) -> QualityTable:
    """Rows of a model from a table, or from the shipped ones."""
    from simulator.predict.quality import load_quality, shipped_quality

    return load_quality(quality).of_model(model) if quality else shipped_quality(model)


def _finite(rows: Sequence[Point] | Sequence[Band]) -> list[dict[str, object]]:
    """Records inside a JSON record; infinite ends of bands become null."""
    return [{k: render.finite(v) for k, v in asdict(row).items()} for row in rows]


def front_title(front: Front) -> str:
    """What a frontier is one of."""
    return f"{front.model}, {front.hardware}, {front.phase}, batch {front.batch}, seq {front.seq}, {front.runtime}"


def front_text(front: Front) -> str:
    """A frontier as text: its points by rising loss, then the bands."""
    columns = render.first_fitting(_layouts(front), render.width())
    table = render.table_text(columns, f"{front_title(front)}\n{front.axis}", color=render.colored())
    sentences = "; ".join(band_text(b) for b in front.bands)
    cited = (
        ""
        if any(c.title == "source" for c in columns)
        else f"\nsource: {'; '.join(dict.fromkeys(p.source for p in front.points))}"
    )
    return f"{table}{cited}\n\nfastest family by quality budget: {sentences}"


def band_text(band: Band) -> str:
    """A band as the paper writes it.

    >>> from simulator.predict.pareto import Band
    >>> band_text(Band("depth", 0.0, 0.04, 1.1, 1.2, True)), band_text(Band("width", 0.17, float("inf"), 1.5, 1.5, False))
    ('0-4 % depth (1.10-1.20x)', 'from 17 % width (1.50x, not sure)')
    """
    low, high = f"{100 * band.low:.3g}", f"{100 * band.high:.3g}"
    reach = f"from {low} %" if math.isinf(band.high) else f"{low}-{high} %"
    speeds = list(dict.fromkeys(f"{s:.2f}" for s in (band.speedup_low, band.speedup_high)))
    return f"{reach} {band.family} ({'-'.join(speeds)}x{'' if band.sure else ', not sure'})"


def _layouts(front: Front) -> Iterator[list[render.Column]]:
    """Layouts from the one with sources down to the narrowest."""
    points = front.points

    def layout(source: bool, beaten: bool, interval: bool) -> list[render.Column]:
        ends = [
            f" ({render.ratio(p.speedup_lower)}-{render.ratio(p.speedup_upper)})" if interval else "" for p in points
        ]
        speed = [render.ratio(p.speedup) + end for p, end in zip(points, ends)]
        columns = [
            render.Column("method", ["dense", *(p.method for p in points)], right=False),
            render.Column("family", ["", *(p.family for p in points)], right=False),
            render.Column("pruned", ["", *(render.percent(p.sparsity) for p in points)]),
            render.Column("loss", ["0 %", *(render.percent(p.loss) for p in points)]),
            render.Column("speedup", ["1.00", *speed]),
            render.Column(
                "optimal", ["", *("yes *" if p.sure else "yes" if p.optimal else "" for p in points)], right=False
            ),
        ]
        if any(p.measured for p in points):
            columns.append(
                render.Column("speed", ["", *("measured" if p.measured else "predicted" for p in points)], right=False)
            )
        if beaten:
            columns.append(render.Column("beaten by", ["", *(p.beaten_by for p in points)], right=False))
        if source:
            columns.append(render.Column("source", ["", *(p.source for p in points)], right=False))
        return columns

    yield layout(True, True, True)
    yield layout(False, True, True)
    yield layout(False, False, True)
    yield layout(False, False, False)


def draw_fronts(found: Sequence[Front], path: str) -> None:
    """The frontiers as a figure, a panel each."""
    from simulator.figures.pareto import pareto_figure
    from simulator.figures.save import save_figure

    points = [(f, p) for f in found for p in f.points]
    settings = len({(f.phase, f.batch, f.seq) for f in found}) > 1
    lengths = len({f.seq for f in found}) > 1
    names = [f"{f.phase}, batch {f.batch}" + (f", seq {f.seq}" if lengths else "") for f, _ in points]
    rows = names if settings else [f.phase for f, _ in points]
    figure = pareto_figure(
        rows,
        [f.hardware for f, _ in points],
        [p.family for _, p in points],
        [p.method for _, p in points],
        [p.loss for _, p in points],
        [p.speedup for _, p in points],
        [p.speedup_lower for _, p in points],
        [p.speedup_upper for _, p in points],
        axis=found[0].axis.metric,
        protocol=found[0].axis.protocol,
        interval=f"{100 * found[0].level:.4g} % interval",
    )
    save_figure(figure, path)
