"""``prunesim claims``: do the reference paper's claims hold on these devices and models?"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.predict.words import uncalibrated

if TYPE_CHECKING:
    from simulator.predict.claims import Verdict

STYLES = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


@options.expanded("phase", "concurrency", "new_tokens", "weight_dtype", "kv_dtype", "devices", "parallel")
def claims(
    models: Annotated[str, arg("MODELS", "Models, separated by commas.")] = "llama-3.1-8b,llama-2-7b",
    hardware: options.Hardware = "a100,h100,rtx_4090",
    quality: Annotated[str | None, opt("--quality", "FILE", "Quality table (CSV); else the shipped ones.")] = None,
    run: options.Run = options.RUN,
    json: options.Json = False,
) -> None:
    """Test two claims of the reference paper, with numbers.

    (a) bound: in memory-bound inference static depth is the strongest baseline and stays closest to its theoretical
    bound. (b) order: along the prefill frontier come static depth, dynamic depth, static width. Where a family has no
    quality data, it is said.
    """
    asked = run.asked()
    del asked["phase"]  # each claim has its own
    devices, names = options.names("--hardware", hardware), options.names("MODELS", models)
    from simulator.predict.claims import verdicts

    found: list[Verdict] = []
    with render.progress("testing") as report:
        for done, model in enumerate(names):
            found += verdicts(model, devices, quality, **asked)
            report(done + 1, len(names))
    if render.Output(json).write([asdict(v) for v in found]):
        _print(found)
    for line in uncalibrated(found):
        render.note(line)


def _cell(v: Verdict | None) -> str:
    """A verdict; where the intervals leave it open, also what the predicted values say."""
    if v is None:
        return ""
    lean = {"holds": " (+)", "does not hold": " (-)"}.get(v.predicted, "")
    return v.verdict + (lean if v.verdict == "undecided" else "")


def _print(found: Sequence[Verdict]) -> None:
    """A table of verdicts for each claim, then the numbers of each."""
    from simulator.predict.claims import CLAIMS

    for claim, text in CLAIMS.items():
        chosen = [v for v in found if v.claim == claim]
        if not chosen:
            continue
        sharing = list(dict.fromkeys((v.model, v.phase, v.batch, v.seq, v.axis) for v in chosen))
        devices = list(dict.fromkeys(v.hardware for v in chosen))
        at = {(v.model, v.phase, v.batch, v.seq, v.axis, v.hardware): v for v in chosen}
        columns = render.columns(
            sharing,
            ("<model", lambda s: s[0]),
            ("<phase", lambda s: f"{s[1]}, batch {s[2]}, seq {s[3]}"),
            ("<quality", lambda s: s[4].partition(" [")[0] or "-"),
        )
        if not any(s[4] for s in sharing):
            columns.pop()
        for h in devices:
            verdicts = [_cell(at.get((*s, h))) for s in sharing]
            styles = [STYLES.get(v.partition(" (")[0], "") for v in verdicts]
            columns.append(render.Column(h, verdicts, right=False, styles=styles))
        render.show(columns, "\n".join(textwrap.wrap(f"({'a' if claim == 'bound' else 'b'}) {text}", render.width())))
        print()
        for v in chosen:
            where = f"{v.model}, {v.hardware}, {v.phase}, batch {v.batch}, seq {v.seq}"
            missing = f"; no data for {' and '.join(v.missing)}" if v.missing else ""
            cited = f" [{v.axis}; {v.source}]" if v.axis else ""
            line = f"{where}: {v.verdict}: {v.numbers}{missing}{cited}"
            print(textwrap.fill(line, render.width(), subsequent_indent="    ", break_on_hyphens=False))
        print()
    if any(v.verdict == "undecided" for v in found):
        print(
            "undecided: the ends of the intervals disagree, or a family has no data; "
            "(+) the predictions alone speak for it, (-) against"
        )
