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
    out.check()
    from simulator.prediction.claims import judged_file
    from simulator.prediction.notes import uncalibrated

    found = judged_file(file)
    rows = [one.to_dict() for one in found]
    flat = [{name: row[name] for name in row if name != "causes"} for row in rows]
    if out.write(rows, flat):
        unlikely = [one for one in found if one.unlikely]
        broken = sum(one.breaks_bound for one in found)
        render.conclude(
            f"{len(unlikely)} of {len(found)} claims are unlikely; {broken} break their bound."
        )
        _print_claims(found)
        for one in unlikely:
            print()
            print_judgement(one, out.verbose)
        render.notes(uncalibrated(one.result for one in found), out.verbose)


def _print_claims(found: Sequence[Judgement]) -> None:
    from simulator.prediction.wording import probability_text

    columns = render.columns(
        found,
        ("<model", "result.model"),
        ("<pruning", "result.pruning"),
        ("claimed", lambda j: f"{j.claimed:g}"),
        ("predicted", "result", render.interval),
        ("prob-\nability", "probability", probability_text),
        ("bound", "result.roofline_bound", render.ratio),
        ("<request", "result.request"),
    )
    render.show(render.narrowed(columns, 6))


def print_judgement(one: Judgement, verbose: bool) -> None:
    """Print the answer; ``verbose``: also the likeliest other condition of each kind."""
    from simulator.prediction.wording import probability_text

    render.say(one.sentence)
    if verbose and one.causes:
        columns = render.columns(
            one.each_kind,
            ("<other condition", "name"),
            ("speedup", render.interval),
            ("probability", lambda cause: probability_text(one.of_cause(cause))),
        )
        print()
        render.show(columns)
