"""``prunesim explain``: decompose a predicted speedup, in a sentence and as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.prediction.explain import Explanation


# fmt: off
@options.expanded("csv")
def explain(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = options.PRUNINGS,
    run: options.Run = options.RUN,
    roofline: Annotated[str | None, opt(
        "--roofline", "FILE", "Also draw the layers' GEMMs, dense and pruned, on the roofline.")] = None,
    out: options.Output = options.OUTPUT,
) -> None:
    # fmt: on
    """Explain where a nominal speedup is lost.

    Begins with nominal speedup, predicted speedup and largest losses in a sentence. Named steps lead from the nominal
    speedup 1/(1 - s) to the predicted one; their factors multiply exactly. Several engines are shown side by side. With
    more than three predictions only the sentences are printed, and the steps with --verbose.
    """
    output = render.Output(out.json, figures=[out.figure, roofline])
    if prunings.family is not None and "," in prunings.family:
        raise InputError(f"--family {prunings.family!r}: expected one family to explain")
    from simulator.prediction.explain import explanations
    from simulator.prediction.prunings import readable
    from simulator.prediction.sentences import MOST_SENTENCES, conclusion, conclusions

    asked, given = run.asked(model), prunings.parsed()
    given["pruned"], skipped = readable(given.get("pruned", ()))
    found = explanations(model, devices.profiles, **given, **asked.settings)
    rows = [
        {**e.result.to_dict(), "waterfall": [asdict(step) for step in e.steps], "conclusion": conclusion(e)}
        for e in found
    ]
    if output.write(rows):
        render.conclude(*conclusions(found))
        many = len(found) > MOST_SENTENCES
        if many:
            for e in found:
                print(textwrap.fill(conclusion(e), render.width(), break_on_hyphens=False), end="\n\n")
        groups = [] if many and not out.verbose else _by_engine(found)
        for i, together in enumerate(groups):
            if i:
                print()
            _print(together)
        render.notes([*asked.notes, *skipped, *_notes(found)], out.verbose)
    if out.figure or roofline:
        from simulator.figures.gemms import rooflines_of
        from simulator.figures.style import save_figure
        from simulator.figures.waterfall import waterfalls_of

        if out.figure:
            save_figure(waterfalls_of(found), out.figure)
        if roofline:
            save_figure(rooflines_of(found), roofline)


def _by_engine(found: Sequence[Explanation]) -> list[list[Explanation]]:
    """Group explanations of the same pruning, request and device, one per engine."""
    groups: dict[tuple[object, ...], list[Explanation]] = {}
    for e in found:
        r = e.result
        groups.setdefault((r.hardware, r.phase, r.batch, r.seq, r.pruning), []).append(e)
    return list(groups.values())


def _notes(found: Sequence[Explanation]) -> list[str]:
    """Return notes on a measured time, calibration, assumptions and pruned checkpoints."""
    from simulator.prediction.sentences import (
        assumed_link,
        difference_lines,
        experts_assumed,
        inferred_line,
        uncalibrated,
    )

    lines = []
    for e in found:
        if e.inferred is not None and e.dense_s is not None:
            lines.append(inferred_line(e.inferred, e.hardware.label, e.dense_s))
    lines += uncalibrated(e.result for e in found)
    assumed = (note for e in found for note in (assumed_link(e.hardware, e.dense), experts_assumed(e.dense)))
    lines += dict.fromkeys(filter(None, assumed))
    return lines + [line for e in found for line in difference_lines(e.dense.meta.config, e.pruned.meta.config)]


def _print(together: Sequence[Explanation]) -> None:
    """Print the waterfalls of some engines next to each other, with times and bounds."""
    from simulator.prediction.sentences import NOTABLE, parts_line

    available, first, several = render.width(), together[0], len(together) > 1
    names = [step.name for step in first.steps]
    columns = [render.Column("step", names, right=False)]
    for e in together:
        above = f"{e.result.engine}\n" if several else ""
        factors = ["", *(f"x{step.factor:.3f}" for step in e.steps[1:])]
        colors = ["red" if s.factor < NOTABLE else "green" if s.factor > 1 / NOTABLE else "" for s in e.steps[1:]]
        columns.append(render.Column(f"{above}factor", factors, styles=["", *colors]))
        columns.append(render.Column(f"{above}speedup", [f"{step.speedup:.3f}" for step in e.steps]))
    shown, room = columns, available - render.table_width(columns) - 2
    if room >= 20:
        notes = [step.note for step in first.steps]
        cut = [note if len(note) <= room else f"{note[: room - 3].rstrip()}..." for note in notes]
        shown = [*columns, render.Column("meaning", cut, right=False)]
    r = first.result
    title = replace(r, engine=", ".join(e.result.engine for e in together)).scenario
    name = f"{r.pruning} ({r.family})" if r.pruned or r.method else r.pruning
    render.show(shown, f"{name}, {r.hardware}: {title}")
    if r.parts:
        print()
        print(textwrap.fill(f"removed: {parts_line(r)}", available, subsequent_indent="  ", break_on_hyphens=False))
    print()
    for e in together:
        r = e.result
        dense = render.seconds_between(r.dense_s, r.dense_lower, r.dense_upper)
        pruned = render.seconds_between(r.pruned_s, r.pruned_lower, r.pruned_upper)
        print(f"{f'{r.engine}: ' if several else ''}dense {dense}, pruned {pruned}")
    print(f"bounds: FLOP {r.flop_bound:.3f}, byte {r.byte_bound:.3f}, roofline {r.roofline_bound:.3f}")
