"""``prunesim paper``: predictions of the taxonomy paper's benchmark next to its published
values."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import option
from simulator.display import with_and
from simulator.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from calibration.validation.paper import Cell, ClaimOutcome

STYLES = {"holds": "green", "does not hold": "red", "undecided": "yellow"}

MARGIN = (
    "margin: the difference compared, divided by its interval's half-width on the side towards 0. A"
    " claim has the margin of the comparison that decides it: from +1 up it holds, from -1 down it"
    " does not."
)

_LABELS = (
    ("<family", lambda r: r[0]),
    ("removed", lambda r: f"{100 * r[1]:.0f} %"),
)


@options.expanded("csv", "verbose")
def command(
    hardware: str = option(
        "NAMES", "Other GPUs for the predicted table, separated by commas.", "a100,h100,rtx_4090"
    ),
    engine: str = option("NAMES", "Engines to predict it in there.", "reference,vllm"),
    claims: bool = option(None, "Test the paper's two claims on these GPUs and engines.", False),
    out: options.Output = options.OUTPUT,
) -> None:
    """Predict the table of the taxonomy paper.

    Begins with the number of published values that lie in their interval. Then come predicted and
    published values (Llama-3.1-8B, mean over batch 1, 8, 16, 32 at 1024 tokens; arXiv 2606.09080,
    Table 2, as quoted in a public reading note), predictions for other GPUs and engines, and the
    paper's Figure 2. --claims tests two claims: (a) in memory-bound inference static depth is the
    strongest baseline; (b) along the prefill frontier come static depth, dynamic depth, static
    width.
    """
    from calibration.validation import paper

    out.check()
    devices, engines = parsing.names("--hardware", hardware), parsing.names("--engine", engine)
    if claims:
        if out.figure:
            raise InputError("--figure: draws the paper's table; expected without --claims")
        _show_claims(devices, engines, out.json)
        return
    cells, others = paper.table_2(), paper.table_2(devices, engines)
    if out.figure:
        out.draw(lambda: _figure(cells))

    def record(c: Cell) -> dict[str, Any]:
        return asdict(c) | {
            "error": c.error,
            "inside": None if math.isnan(c.published) else c.inside,
        }

    split = paper.figure_2()
    parts = {
        "table 2": [*map(record, cells)],
        "elsewhere": [*map(record, others)],
        "figure 2": split,
    }
    if not out.write([{"what": what, **row} for what, part in parts.items() for row in part]):
        return
    render.conclude(_conclusion(cells))
    columns = [*_LABELS, *_phase_columns(cells, "prefill"), *_phase_columns(cells, "decode")]
    render.show(
        render.columns(_rows(cells), *columns), f"{cells[0].hardware}, {cells[0].engine}: Table 2"
    )
    print("*: outside its 90 % interval")
    for engine in dict.fromkeys(c.engine for c in others):
        some = [c for c in others if c.engine == engine]
        _print_columns(
            f"Predicted speedups in {engine}, prefill / decode",
            _rows(some),
            *_LABELS,
            *_by_device(some),
        )
    _print_columns(
        "Time of the dense model by part, batch 1 at 32768 tokens (Figure 2)",
        split,
        ("<phase", "phase"),
        ("<part", "part"),
        ("published", "measured_s", render.seconds),
        ("predicted", "predicted_s", render.seconds),
        ("error", lambda p: f"{round(100 * (p['predicted_s'] / p['measured_s'] - 1)):+d} %"),
    )


def _print_columns(title: str, rows: Sequence[Any], *columns: render.Described[Any]) -> None:
    print()
    render.show(render.columns(rows, *columns), title)


def _conclusion(cells: Sequence[Cell]) -> str:
    inside, worst = sum(c.inside for c in cells), max(cells, key=lambda c: abs(c.error))
    about = (
        f"{inside} of {len(cells)} published speedups lie in the 90 % interval of their prediction"
    )
    where = f"{worst.family} {render.percent(worst.sparsity)} in {worst.phase}"
    half = 100 * median(abs(c.error) for c in cells)
    return (
        f"{about}; the median error is {half:.1f} %, the largest {100 * abs(worst.error):.1f} %"
        f" ({where})."
    )


def _rows(cells: Sequence[Cell]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((c.family, c.sparsity) for c in cells))


def _phase_columns(cells: Sequence[Cell], phase: str) -> list[render.Described[Any]]:
    def predicted(r: tuple[str, float]) -> str:
        c = at[r]
        return f"{c.predicted:.2f} ({c.lower:.2f}-{c.upper:.2f})" + ("" if c.inside else " *")

    at = {(c.family, c.sparsity): c for c in cells if c.phase == phase}
    published: render.Described[Any] = f"{phase}:\npaper", lambda r: f"{at[r].published:.2f}"
    return [
        published,
        ("<predicted", predicted),
        ("error", lambda r: f"{100 * at[r].error:+.1f} %"),
    ]


def _by_device(cells: Sequence[Cell]) -> list[render.Described[Any]]:
    at = {(c.hardware, c.phase, (c.family, c.sparsity)): f"{c.predicted:.2f}" for c in cells}

    def both(name: str, r: tuple[str, float]) -> str:
        return " / ".join(at[name, phase, r] for phase in ("prefill", "decode"))

    return [(name, partial(both, name)) for name in dict.fromkeys(c.hardware for c in cells)]


def _show_claims(devices: Sequence[str], engines: Sequence[str], json: bool) -> None:
    from calibration.validation.paper import (
        CLAIMS,
        HARDWARE,
        MODEL,
        NOT_APPLICABLE,
        claim_outcomes,
    )
    from simulator.prediction.notes import uncalibrated

    with render.progress("testing") as report:
        found = claim_outcomes([HARDWARE, *devices], engines, report)
    if options.Output(json).write([asdict(o) for o in found]):
        outcomes = {
            letter: [o for o in found if o.claim == claim] for letter, claim in zip("ab", CLAIMS)
        }
        render.conclude(*(_claim_sentence(letter, some) for letter, some in outcomes.items()))
        for (letter, some), text in zip(outcomes.items(), CLAIMS.values()):
            print(textwrap.fill(f"({letter}) {text}", render.width()), end="\n\n")
            render.show(_claim_columns(some), f"{MODEL}, batch {some[0].batch}, seq {some[0].seq}")
            print()
            for o in (o for o in some if o.verdict != NOT_APPLICABLE):
                lines = textwrap.wrap(
                    _claim_text(o), render.width(), subsequent_indent="    ", break_on_hyphens=False
                )
                print("\n".join(lines))
            print()
        print(textwrap.fill(MARGIN, render.width()))
    render.notes(uncalibrated(found))


def _claim_sentence(letter: str, some: Sequence[ClaimOutcome]) -> str:
    from calibration.validation.paper import NOT_APPLICABLE, UNDECIDED

    counts = Counter(o.verdict for o in some if o.verdict != NOT_APPLICABLE)
    verbs = {UNDECIDED: "is undecided"}
    verdicts = with_and(
        [f"{verbs.get(verdict, verdict)} in {count}" for verdict, count in counts.most_common()]
    )
    many = f"{sum(counts.values()) or len(some)} combinations of GPU, engine and phase"
    return f"Claim ({letter}) {verdicts or 'applies in none'} of {many}."


def _claim_columns(some: Sequence[ClaimOutcome]) -> list[render.Column]:
    from calibration.validation.paper import NOT_APPLICABLE

    def margin(o: ClaimOutcome, value: float | None) -> str:
        return "-" if value is None or o.verdict == NOT_APPLICABLE else f"{value:+.2f}"

    sparsities = dict.fromkeys(s for o in some for s, _ in o.margins)
    columns = render.columns(
        some,
        ("<hardware", "hardware"),
        ("<engine", "engine"),
        ("<phase", "phase"),
        ("<verdict", "verdict"),
        ("margin", lambda o: margin(o, o.margin)),
        *(
            (f"at {render.percent(s)}", lambda o, s=s: margin(o, dict(o.margins).get(s)))
            for s in sparsities
        ),
        ("<bottleneck", "bottleneck"),
    )
    columns[3] = replace(columns[3], styles=[STYLES.get(o.verdict, "") for o in some])
    return render.narrowed(columns if sparsities else columns[:-1], 5)


def _claim_text(o: ClaimOutcome) -> str:
    """Return the verdict at each sparsity, and the comparison that decides."""
    from calibration.validation.paper import decided

    at: dict[str, list[str]] = {}
    for sparsity, margin in o.margins:
        at.setdefault(decided(margin), []).append(f"{100 * sparsity:g}")
    verdicts = (
        "; ".join(f"{verdict} at {', '.join(some)} %" for verdict, some in at.items()) or o.verdict
    )
    parts = [verdicts, f"decided by {o.decided_by}" + (f" ({o.needed})" if o.needed else "")]
    if o.elsewhere:
        parts.append(f"on the frontier where another family is claimed: {', '.join(o.elsewhere)}")
    return f"{o.hardware}, {o.engine}, {o.phase}: {'; '.join(parts)}"


def _figure(cells: Sequence[Cell]) -> Figure:
    from simulator.figures.measured import Beside, published_figure

    panels = []
    for phase in ("prefill", "decode"):
        for s in sorted({c.sparsity for c in cells}):
            bars = [c for c in cells if c.phase == phase and c.sparsity == s]
            values = [
                [getattr(c, name) for c in bars]
                for name in ("published", "predicted", "lower", "upper")
            ]
            panels.append(
                Beside(f"{phase}, {100 * s:.0f} % removed", [c.family for c in bars], *values)
            )
    return published_figure(panels)
