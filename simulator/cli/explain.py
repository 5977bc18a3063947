"""``prunesim explain``: where the promised speedup of a pruned model is lost, as a table and in a sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render
from simulator.errors import InputError
from simulator.predict.words import LOSS, conclusion, setting_title

if TYPE_CHECKING:
    from simulator.predict.speedup import Step
    from simulator.predict.table import Explanation


def explain(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of a model, or its Hugging Face config.json (file or folder).")
    ],
    hardware: options.Hardware,
    family: Annotated[str, typer.Option("--family", metavar="NAME", help="One pruning family.")],
    sparsity: Annotated[
        str,
        typer.Option("--sparsity", metavar="FRACTION", help="Fraction removed, or by part: attention=0.25,mlp=0.5."),
    ],
    phase: options.Phase = "prefill",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    new_tokens: options.NewTokens = 128,
    runtime: options.Runtime = "cuda_graph",
    dtype: options.Dtype = "bf16",
    weight_dtype: options.WeightDtype = None,
    kv_dtype: options.KvDtype = None,
    devices: options.Devices = 1,
    parallel: options.Parallel = "tensor",
    ideal: options.Ideal = False,
    option: options.Option = None,
    json: options.Json = False,
    figure: options.Figure = None,
    roofline: Annotated[
        str | None,
        typer.Option("--roofline", metavar="FILE", help="Also draw the dense and the pruned GEMMs on the roofline."),
    ] = None,
) -> None:
    """Explain where a promised speedup is lost.

    Named steps lead from the nominal speedup 1/(1 - s) to the predicted one; their factors multiply exactly.
    """
    for path in (figure, roofline):
        if path:
            from simulator.figures.save import check_figure

            check_figure(path)
    if "," in family:
        raise InputError(f"--family {family!r}: expected one family to explain")
    from simulator.predict.table import explanations

    found = explanations(
        model,
        options.names("--hardware", hardware),
        family,
        options.sparsity("--sparsity", sparsity),
        options.names("--phase", phase),
        options.integers("--batch", batch),
        options.integers("--seq", seq),
        setting=options.setting(new_tokens, runtime, dtype, weight_dtype, kv_dtype, devices, parallel),
        ideal=ideal,
        options=options.settings("--option", option),
    )
    if json:
        print(
            render.json_lines(
                [
                    {**asdict(e.record), "waterfall": [asdict(step) for step in e.steps], "conclusion": conclusion(e)}
                    for e in found
                ]
            )
        )
    else:
        for i, e in enumerate(found):
            if i:
                print()
            _print(e)
    if figure:
        from simulator.cli.drawing import draw_waterfalls

        draw_waterfalls(found, figure)
    if roofline:
        from simulator.cli.drawing import draw_rooflines

        draw_rooflines(found, roofline)


def _print(e: Explanation) -> None:
    available = render.width()
    names = [step.name for step in e.steps]
    columns = [
        render.Column("step", names, right=False),
        render.Column("factor", ["", *(f"x{step.factor:.3f}" for step in e.steps[1:])], styles=_styles(e.steps)),
        render.Column("speedup", [f"{step.speedup:.3f}" for step in e.steps]),
    ]
    room = available - render.table_width(columns) - 2
    columns.append(render.Column("what it is", [_cut(step.note, room) for step in e.steps], right=False))
    r = e.record
    render.show(
        columns if room >= 20 else columns[:3],
        f"{r.family} {render.percent(r.sparsity)}, {r.hardware}: {setting_title(r)}",
    )
    print(
        f"\ndense {render.seconds(r.dense_s)}, pruned {render.seconds(r.pruned_s)}; "
        f"bounds: FLOP {r.flop_bound:.3f}, byte {r.byte_bound:.3f}, roofline {r.roofline_bound:.3f}"
    )
    print(textwrap.fill(conclusion(e), available))


def _styles(steps: Sequence[Step]) -> list[str]:
    return ["", *("red" if s.factor < LOSS else "green" if s.factor > 1 / LOSS else "" for s in steps[1:])]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 3, 0)].rstrip() + "..."
