"""``prunesim gemm``: predict and decompose the time of single GEMMs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, parsing, render
from simulator.cli.options import arg, option
from simulator.request import DEFAULT_DTYPE

if TYPE_CHECKING:
    from simulator.prediction.gemms import GemmRecord

_MEANING = {
    "roofline": "the longer of FLOPs / peak and bytes / bandwidth",
    "tile": "shape padded to whole tiles",
    "wave": "last wave of tiles leaves SMs idle",
    "alignment": "N or K not a multiple of 8",
    "kernel": "the kernel's efficiency at this shape",
    "launch": "fixed time of a kernel",
}


@dataclass(frozen=True)
class Product:
    dtype: str = options.setting_option(
        "dtype", text="Number format of activations and arithmetic.", default=DEFAULT_DTYPE
    )
    weight_dtype: str | None = options.setting_option("weight_dtype")
    semi_structured: bool = option(None, "Weights with 2:4 sparsity on sparse tensor cores.", False)
    warm: bool = option(
        None, "Weights already in the L2 cache; by default they come from memory.", False
    )


@options.expanded("csv", "verbose")
def gemm(
    m: Annotated[str, arg("M", "Tokens; a comma list for several.")],
    n: Annotated[str, arg("N", "Output features; a comma list for several.")],
    k: Annotated[str, arg("K", "Input features; a comma list for several.")],
    devices: options.Devices = options.DEVICES,
    product: Product = Product(),
    explain: bool = option(None, "Show the steps from the roofline to the predicted time.", False),
    out: options.Output = options.OUTPUT,
) -> None:
    """Predict the time of a matrix product.

    The product is y[M,N] = x[M,K] w[K,N]. Weights w are in memory; activations x were just written.
    "kernels" names the software stack whose kernels were fitted: vllm's, or the next that was;
    --hardware GPU@STACK selects another.
    """
    sizes = parsing.integers("M", m), parsing.integers("N", n), parsing.integers("K", k)
    out.check()
    from simulator.prediction.gemms import gemm_table

    rows = gemm_table(*sizes, devices.profiles, **asdict(product))
    if out.write([asdict(r) for r in rows]):
        _print(rows)
        for row in rows if explain else ():
            print()
            _print_steps(row)
    if out.figure:
        from simulator.figures.gemms import gemms_of

        out.draw(lambda: gemms_of(rows))


def _print(rows: Sequence[GemmRecord]) -> None:
    columns = render.columns(
        rows,
        ("M", "m"),
        ("N", "n"),
        ("K", "k"),
        ("<hardware", "hardware"),
        ("time", "seconds", render.seconds),
        ("90 % interval", lambda r: f"{render.seconds(r.lower_s)} - {render.seconds(r.upper_s)}"),
        ("<bottleneck", "bottleneck"),
        ("<kernels", lambda r: "not fitted" if r.status == "default" else r.stack or "own"),
        ("roofline", "roofline_s", render.seconds),
        ("TFLOP/s", lambda r: f"{r.flop_per_s / 1e12:.3g}"),
        ("of peak", lambda r: render.percent(round(r.flop_per_s / r.peak_flop_per_s, 3))),
    )
    render.show(render.narrowed(columns, 5))


def _print_steps(row: GemmRecord) -> None:
    names, values = list(row.steps_s), list(row.steps_s.values())
    factors = ["", *(f"x{value / before:.3f}" for before, value in itertools.pairwise(values))]
    columns = [
        render.Column("effect", names, right=False),
        render.Column("factor", factors),
        render.Column("time", [render.seconds(value) for value in values]),
        render.Column("meaning", [_MEANING.get(name, "") for name in names], right=False),
    ]
    render.show(
        columns, f"{row.m} x {row.n} x {row.k}, {row.dtype}, {row.hardware}: {row.bottleneck}-bound"
    )
