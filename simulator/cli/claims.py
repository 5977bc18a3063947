"""``prunesim claims``: do the reference paper's claims hold on these models, devices and engines?"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt

if TYPE_CHECKING:
    from simulator.predict.claims import Verdict

STYLES = {"holds": "green", "does not hold": "red", "undecided": "yellow"}

LEGEND = (
    "margin: what a comparison is ahead by, in units of how far the interval of that difference reaches towards 0. "
    "A claim has that of the comparison it hangs on: from +1 up it holds (if no family lacks data), from -1 down not."
)


@options.expanded("phase", "concurrency", "new_tokens", "weight_dtype", "kv_dtype", "devices", "parallel")
def claims(
    models: Annotated[str, arg("MODELS", "Models, separated by commas.")] = "llama-3.1-8b,llama-2-7b",
    hardware: options.Hardware = "a100,h100,rtx_4090",
    quality: Annotated[str | None, opt("--quality", "FILE", "Quality table (CSV); else the shipped ones.")] = None,
    run: options.Run = options.RUN,
    json: options.Json = False,
) -> None:
    """Test two claims of the reference paper, with margins.

    (a) bound: in memory-bound inference static depth is the strongest baseline and stays closest to its theoretical
    bound. (b) order: along the prefill frontier come static depth, dynamic depth, static width. Where one is undecided,
    what would decide it is said.
    """
    asked = run.requests()
    devices, names = options.names("--hardware", hardware), options.names("MODELS", models)
    from simulator.predict.claims import verdicts

    found: list[Verdict] = []
    with render.progress("testing") as report:
        for i, model in enumerate(names):

            def of_model(done: int, total: int, before: int = i) -> None:
                report(before * total + done, len(names) * total)

            found += verdicts(
                model,
                devices,
                quality,
                asked.batch,
                asked.seq,
                engine=asked.engine,
                scenario=asked.scenario,
                progress=of_model,
            )
    if render.Output(json).write([asdict(v) for v in found]):
        for block in _blocks(found):
            print(block, end="\n\n")
        print(textwrap.fill(LEGEND, render.width()))
    from simulator.predict.caveats import uncalibrated

    for line in uncalibrated((f.hardware for f in found), (f.calibrated for f in found)):
        render.note(line)


def _blocks(found: Sequence[Verdict]) -> Iterator[str]:
    """The verdicts on each claim, model, request and axis as a table, then what each hangs on."""
    from simulator.predict.claims import CLAIMS, NOT_APPLICABLE

    for letter, (claim, text) in zip("ab", CLAIMS.items()):
        yield textwrap.fill(f"({letter}) {text}", render.width())
        groups: dict[tuple[object, ...], list[Verdict]] = {}
        for v in (v for v in found if v.claim == claim):
            groups.setdefault((v.model, v.batch, v.seq, v.axis), []).append(v)
        for (model, batch, seq, axis), some in groups.items():
            title = f"{model}, batch {batch}, seq {seq}" + (f"; {axis}" if axis else "")
            yield render.table_text(_columns(some), title, color=render.colored())
            told = [_sentence(v) for v in some if v.verdict != NOT_APPLICABLE]
            sources = dict.fromkeys(source for v in some for source in v.source.split("; ") if source)
            told += [f"source: {'; '.join(sources)}"] if sources else []
            if told:
                yield "\n".join(
                    textwrap.fill(line, render.width(), subsequent_indent="    ", break_on_hyphens=False)
                    for line in told
                )


def _columns(some: Sequence[Verdict]) -> list[render.Column]:
    from simulator.predict.claims import NOT_APPLICABLE

    sparsities = dict.fromkeys(s for v in some for s, _ in v.margins)

    def margin(v: Verdict, value: float | None) -> str:
        return "-" if value is None or v.verdict == NOT_APPLICABLE else f"{value:+.2f}"

    columns = render.columns(
        some,
        ("<hardware", lambda v: v.hardware),
        ("<engine", lambda v: v.engine),
        ("<phase", lambda v: v.phase),
        ("<verdict", lambda v: v.verdict),
        ("margin", lambda v: margin(v, v.margin)),
        *((f"at {render.percent(s)}", lambda v, s=s: margin(v, dict(v.margins).get(s))) for s in sparsities),
        ("<bottleneck", lambda v: v.bottleneck),
    )
    columns[3] = replace(columns[3], styles=[STYLES.get(v.verdict, "") for v in some])
    return render.narrowed(columns if sparsities else columns[:-1], 5)


def _sentence(v: Verdict) -> str:
    from simulator.predict.claims import decided

    at: dict[str, list[str]] = {}
    for sparsity, margin in v.margins:
        at.setdefault(decided(margin), []).append(f"{100 * sparsity:g}")
    by_sparsity = "; ".join(f"{verdict} at {', '.join(some)} %" for verdict, some in at.items())
    parts = {
        "hangs on": v.hangs_on,
        "would decide it": v.needed,
        "no data": " and ".join(v.missing),
        "on the frontier, where another family is claimed": ", ".join(v.between),
        "fastest by loss" if v.axis else "numbers": v.numbers,
    }
    told = [by_sparsity] if len(at) > 1 else []
    told += [f"{name}: {text}" for name, text in parts.items() if text]
    return f"{v.hardware}, {v.engine}, {v.phase}: {'; '.join(told)}"
