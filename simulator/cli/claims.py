"""``prunesim claims``: judge claimed speedups of a file; the answer to ``speedup --claim``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import arg

if TYPE_CHECKING:
    from simulator.prediction.claims import Judgement


@options.expanded("figure")
def claims(
    file: Annotated[
        str,
        arg(
            "FILE",
            "CSV with the columns model, hardware, engine, pruning, phase, batch, speedup, and"
            " optionally seq, new_tokens, dtype and other settings of a request.",
        ),
    ],
    out: options.Output = options.OUTPUT,
) -> None:
    """Judge claimed speedups.

    States how probable each claim is, whether it breaks its roofline bound, and the likeliest
    explanation of an unlikely one: another phase, batch or GPU, a dense model without CUDA graphs,
    a slow host, cached prompts, or custom modelling code, with the speedup that it would give.
    --verbose prints the likeliest of each kind.
    """
    output = render.Output(out.json, out.csv)
    from simulator.prediction.claims import judged_file

    found = judged_file(file)
    rows = [one.to_dict() for one in found]
    flat = [{name: row[name] for name in row if name != "causes"} for row in rows]
    if output.write(rows, flat):
        unlikely = [one for one in found if one.unlikely]
        broken = sum(one.breaks_bound for one in found)
        render.conclude(
            f"{len(unlikely)} of {len(found)} claims are unlikely; {broken} break their bound."
        )
        if not out.verbose:
            _print_claims(found)
        for one in found if out.verbose else ():
            print_judgement(one)


def _print_claims(found: Sequence[Judgement]) -> None:
    """Print one row per claim, then the likeliest explanation of each unlikely one."""
    from simulator.prediction.wording import probability_text

    columns = render.columns(
        list(enumerate(found, start=1)),
        ("", lambda row: row[0]),
        ("<model", lambda row: row[1].result.model),
        ("<pruning", lambda row: row[1].result.pruning),
        ("claimed", lambda row: f"{row[1].claimed:g}"),
        ("predicted", lambda row: render.interval(row[1].result)),
        ("prob-\nability", lambda row: probability_text(row[1].probability)),
        ("bound", lambda row: render.ratio(row[1].result.roofline_bound)),
        ("<request", lambda row: row[1].result.request),
    )
    render.show(render.narrowed(columns, 7))
    for number, one in enumerate(found, start=1):
        if one.unlikely:
            print()
            render.say(f"{number}: likeliest explanation: {one.explanation}.", "   ")


def print_judgement(one: Judgement) -> None:
    """Print the answer, and for an unlikely claim the likeliest other condition of each kind."""
    from simulator.prediction.wording import probability_text

    render.conclude(one.sentence)
    if one.unlikely and one.causes:
        columns = render.columns(
            one.each_kind,
            ("<other condition", lambda cause: cause.name),
            ("speedup", render.interval),
            ("probability", lambda cause: probability_text(one.of_cause(cause))),
        )
        render.show(columns, f"claimed {one.claimed:g}x under other conditions")
        print()
