"""``prunesim gemm``: the time of single matrix products, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render

if TYPE_CHECKING:
    from simulator.predict.gemms import GemmRecord

_MEANING = {
    "roofline": "FLOP / peak or bytes / bandwidth, whichever is longer",
    "tile": "shape padded to whole tiles",
    "wave": "last wave of tiles leaves SMs idle",
    "alignment": "N or K no multiple of 8",
    "kernel": "what the kernel reaches of that",
    "launch": "fixed time of a kernel",
}


def gemm(
    m: Annotated[str, typer.Argument(metavar="M", help="Tokens; a comma list for several.")],
    n: Annotated[str, typer.Argument(metavar="N", help="Output features; a comma list for several.")],
    k: Annotated[str, typer.Argument(metavar="K", help="Input features; a comma list for several.")],
    hardware: options.Hardware,
    dtype: options.Dtype = "bf16",
    weight_dtype: options.WeightDtype = None,
    semi_structured: Annotated[
        bool, typer.Option("--semi-structured", help="Weights with 2:4 sparsity on sparse tensor cores.")
    ] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Weights already in the L2 cache; by default they come from memory.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how the roofline grows to the predicted time.")
    ] = False,
    json: options.Json = False,
    figure: options.Figure = None,
) -> None:
    """Predict the time of a matrix product.

    The product is y[M,N] = x[M,K] w[K,N], weights w coming from memory and activations x from where they were just written.
    """
    sizes = options.integers("M", m), options.integers("N", n), options.integers("K", k)
    if figure:
        from simulator.figures.save import check_figure

        check_figure(figure)
    from simulator.predict.gemms import gemm_table

    rows = gemm_table(
        *sizes,
        options.names("--hardware", hardware),
        dtype=dtype,
        weight_dtype=weight_dtype,
        semi_structured=semi_structured,
        cold=not warm,
    )
    if json:
        print(render.json_lines([asdict(r) for r in rows]))
    else:
        _print(rows)
        if explain:
            for row in rows:
                print()
                _print_ladder(row)
    if figure:
        from simulator.cli.drawing import draw_gemms

        draw_gemms(rows, figure)


def _print(rows: Sequence[GemmRecord]) -> None:
    def column(title: str, cells: list[str], right: bool = True) -> render.Column:
        return render.Column(title, cells, right)

    columns = [
        *(column(key.upper(), [str(getattr(r, key)) for r in rows]) for key in ("m", "n", "k")),
        column("hardware", [r.hardware for r in rows], right=False),
        column("time", [render.seconds(r.seconds) for r in rows]),
        column("90 % interval", [f"{render.seconds(r.lower_s)} - {render.seconds(r.upper_s)}" for r in rows]),
        column("limit", [r.limit for r in rows], right=False),
        column("roofline", [render.seconds(r.roofline_s) for r in rows]),
        column("TFLOP/s", [f"{r.flop_per_s / 1e12:.3g}" for r in rows]),
        column("of peak", [render.percent(round(r.flop_per_s / r.peak_flop_per_s, 3)) for r in rows]),
    ]
    while len(columns) > 5 and render.table_width(columns) > render.width():
        columns.pop()
    render.show(columns)


def _print_ladder(row: GemmRecord) -> None:
    """The steps from the datasheet roofline to the predicted time."""
    steps = list(row.ladder_s.items())
    before = [steps[0][1], *(value for _, value in steps[:-1])]
    render.show(
        [
            render.Column("effect", [name for name, _ in steps], right=False),
            render.Column("factor", ["", *(f"x{value / b:.3f}" for (_, value), b in list(zip(steps, before))[1:])]),
            render.Column("time", [render.seconds(value) for _, value in steps]),
            render.Column("what it is", [_MEANING.get(name, "") for name, _ in steps], right=False),
        ],
        f"{row.m} x {row.n} x {row.k}, {row.dtype}, {row.hardware}: held by {row.limit}",
    )
