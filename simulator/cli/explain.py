"""``prunesim explain``: where the promised speedup of a pruned model is lost, as a table and in a sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.predict.words import LOSS, conclusion, setting_title

if TYPE_CHECKING:
    from simulator.predict.speedup import Step
    from simulator.predict.table import Explanation

Roofline = Annotated[str | None, opt("--roofline", "FILE", "Also draw the dense and the pruned GEMMs on the roofline.")]


@options.expanded()
def explain(
    model: options.Model,
    hardware: options.Hardware,
    family: Annotated[str, opt("--family", "NAME", "One pruning family.")],
    sparsity: Annotated[str, opt("--sparsity", "FRACTION", "Fraction removed, or by part: attention=0.25,mlp=0.5.")],
    run: options.Run = options.RUN,
    ideal: options.Ideal = False,
    option: options.Option = None,
    same_stack: options.SameStack = False,
    json: options.Json = False,
    figure: options.Figure = None,
    roofline: Roofline = None,
) -> None:
    """Explain where a promised speedup is lost.

    Named steps lead from the nominal speedup 1/(1 - s) to the predicted one; their factors multiply exactly.
    """
    output = render.Output(json, figures=[figure, roofline])
    if "," in family:
        raise InputError(f"--family {family!r}: expected one family to explain")
    from simulator.predict.table import explanations

    devices, fraction = options.devices(hardware, same_stack), options.sparsity("--sparsity", sparsity)
    asked, extra = run.asked(), options.settings("--option", option)
    found = explanations(model, devices, family, fraction, **asked, ideal=ideal, options=extra)
    rows = [
        {**asdict(e.record), "waterfall": [asdict(step) for step in e.steps], "conclusion": conclusion(e)}
        for e in found
    ]
    if output.write(rows):
        for i, e in enumerate(found):
            if i:
                print()
            _print(e)
    if figure or roofline:
        from simulator.cli.drawing import draw_rooflines, draw_waterfalls

        if figure:
            draw_waterfalls(found, figure)
        if roofline:
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
        f"\ndense {render.seconds_between(r.dense_s, r.dense_lower, r.dense_upper)}, "
        f"pruned {render.seconds_between(r.pruned_s, r.pruned_lower, r.pruned_upper)}"
        f"\nbounds: FLOP {r.flop_bound:.3f}, byte {r.byte_bound:.3f}, roofline {r.roofline_bound:.3f}"
    )
    print(textwrap.fill(conclusion(e), available))


def _styles(steps: Sequence[Step]) -> list[str]:
    return ["", *("red" if s.factor < LOSS else "green" if s.factor > 1 / LOSS else "" for s in steps[1:])]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 3, 0)].rstrip() + "..."
