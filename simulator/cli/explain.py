"""``prunesim explain``: where the promised speedup of a pruned model is lost, as a table and in a sentence."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.predict.words import LOSS, conclusion, setting_title

if TYPE_CHECKING:
    from simulator.predict.speedup import Step
    from simulator.predict.table import Explanation

Roofline = Annotated[
    str | None, opt("--roofline", "FILE", "Also draw the layers' GEMMs, dense and pruned, on the roofline.")
]

Sparsity = Annotated[str | None, opt("--sparsity", "FRACTION", "Fraction removed, or by part: attention=0.25,mlp=0.5.")]


@options.expanded()
def explain(
    model: options.Model,
    hardware: options.Hardware,
    family: Annotated[str | None, opt("--family", "NAME", "One pruning family.")] = None,
    method: Annotated[str | None, opt("--method", "NAME", "Or one published method: see prunesim methods.")] = None,
    sparsity: Sparsity = None,
    pruned: options.Pruned = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    option: options.Option = None,
    same_stack: options.SameStack = False,
    json: options.Json = False,
    figure: options.Figure = None,
    roofline: Roofline = None,
) -> None:
    """Explain where a promised speedup is lost.

    Named steps lead from the nominal speedup 1/(1 - s) to the predicted one; their factors multiply exactly. Several
    engines stand side by side.
    """
    output = render.Output(json, figures=[figure, roofline])
    if family is not None and "," in family:
        raise InputError(f"--family {family!r}: expected one family to explain")
    from simulator.predict.table import explanations

    devices = options.devices(hardware, same_stack)
    fraction = None if sparsity is None else options.sparsity("--sparsity", sparsity)
    models = [] if pruned is None else options.names("--pruned", pruned)
    extra = options.settings("--option", option)
    more: dict[str, Any] = {"method": method, "pruned": models, "ideal": ideal, "options": extra}
    with render.progress("explaining") as report:
        found = explanations(model, devices, family, fraction, **known.added(run.asked()), **more, progress=report)
    rows = [
        {**asdict(e.record), "waterfall": [asdict(step) for step in e.steps], "conclusion": conclusion(e)}
        for e in found
    ]
    if output.write(rows):
        for i, together in enumerate(_by_engine(found)):
            if i:
                print()
            _print(together)
        for line in _told(found):
            render.note(line)
    if figure or roofline:
        from simulator.cli.drawing import draw_rooflines, draw_waterfalls

        if figure:
            draw_waterfalls(found, figure)
        if roofline:
            draw_rooflines(found, roofline)


def _by_engine(found: Sequence[Explanation]) -> list[list[Explanation]]:
    """Explanations of the same pruning, request and device together, an engine each."""
    groups: dict[tuple[object, ...], list[Explanation]] = {}
    for e in found:
        r = e.record
        groups.setdefault((r.hardware, r.phase, r.batch, r.seq, r.pruned), []).append(e)
    return list(groups.values())


def _told(found: Sequence[Explanation]) -> list[str]:
    """What a checkpoint is, what was pruned of it, and what a measured time says; each line once."""
    from simulator.predict.caveats import inferred_line
    from simulator.predict.choices import found_in

    lines = [line for e in found for line in found_in(e.dense.meta.config, e.pruned.meta.config)]
    known = [(e.inferred, e.hardware.label, e.dense_s) for e in found]
    lines += [inferred_line(told, label, dense_s) for told, label, dense_s in known if told is not None and dense_s]
    return list(dict.fromkeys(lines))


def _print(together: Sequence[Explanation]) -> None:
    available, first, several = render.width(), together[0], len(together) > 1
    names = [step.name for step in first.steps]
    columns = [render.Column("step", names, right=False)]
    for e in together:
        above = f"{e.record.engine}\n" if several else ""
        factors = ["", *(f"x{step.factor:.3f}" for step in e.steps[1:])]
        columns.append(render.Column(f"{above}factor", factors, styles=_styles(e.steps)))
        columns.append(render.Column(f"{above}speedup", [f"{step.speedup:.3f}" for step in e.steps]))
    shown, room = columns, available - render.table_width(columns) - 2
    if room >= 20:
        shown = [*columns, render.Column("what it is", [_cut(step.note, room) for step in first.steps], right=False)]
    r = first.record
    title = setting_title(replace(r, engine=", ".join(e.record.engine for e in together)))
    name = f"{r.pruned or r.method} ({r.family})" if r.pruned or r.method else r.family
    render.show(shown, f"{name} {render.percent(r.sparsity)}, {r.hardware}: {title}")
    print()
    for e in together:
        r = e.record
        dense = render.seconds_between(r.dense_s, r.dense_lower, r.dense_upper)
        pruned = render.seconds_between(r.pruned_s, r.pruned_lower, r.pruned_upper)
        print(f"{f'{r.engine}: ' if several else ''}dense {dense}, pruned {pruned}")
    print(f"bounds: FLOP {r.flop_bound:.3f}, byte {r.byte_bound:.3f}, roofline {r.roofline_bound:.3f}")
    for e in together:
        print(textwrap.fill(conclusion(e), available))


def _styles(steps: Sequence[Step]) -> list[str]:
    return ["", *("red" if s.factor < LOSS else "green" if s.factor > 1 / LOSS else "" for s in steps[1:])]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 3, 0)].rstrip() + "..."
