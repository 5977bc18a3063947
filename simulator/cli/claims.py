"""``prunesim claims``: do the reference paper's claims hold on these devices and models?"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError
from simulator.predict.words import uncalibrated

if TYPE_CHECKING:
    from simulator.predict.claims import Verdict
    from simulator.predict.quality import QualityTable
    from simulator.predict.settings import Setting

STYLES = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


@options.expanded("phase", "new_tokens", "weight_dtype", "kv_dtype", "devices", "parallel")
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
    found: list[Verdict] = []
    with render.progress("testing") as report:
        for done, model in enumerate(names):
            found += _of_model(model, devices, quality, **asked)
            report(done + 1, len(names))
    if render.Output(json).write([asdict(v) for v in found]):
        _print(found)
    for line in uncalibrated(found):
        render.note(line)


def _of_model(
    model: str, hardware: Sequence[str], quality: str | None, batch: Sequence[int], seq: Sequence[int], setting: Setting
) -> list[Verdict]:
    """Both claims for one model."""
    from simulator.models.library import load_model
    from simulator.predict.claims import axes_to_test, bound_claim, order_claim

    config = load_model(model)
    out = list(bound_claim(config, hardware, ["prefill", "decode"], batch, seq, setting=setting))
    table = _rows(quality, config.name)
    axes = axes_to_test(table) if table else ()
    for axis in axes:
        assert table is not None
        out += order_claim(config, hardware, table, axis, batch, seq, setting=setting)
    if not axes:
        out += _no_data(config.name, hardware, table, batch, seq)
    return out


def _rows(quality: str | None, model: str) -> QualityTable | None:
    """Quality rows of a model; none where the shipped tables have none."""
    from simulator.cli.pareto import quality_rows

    try:
        return quality_rows(quality, model)
    except InputError:
        if quality:
            raise
        return None


def _no_data(
    model: str, hardware: Sequence[str], table: QualityTable | None, batch: Sequence[int], seq: Sequence[int]
) -> list[Verdict]:
    """Verdicts of (b) where no axis has two of its families."""
    from simulator.hardware.library import load_hardware
    from simulator.predict.claims import GROUPS, NO_DATA, Verdict, group_of

    has = sorted({group_of(r.family) for r in table.rows} - {""}) if table else []
    missing = tuple(name for name in GROUPS if name not in has)
    text = f"no metric and protocol with two of the families; there is quality of: {', '.join(has) or 'none of them'}"
    where = itertools.product([load_hardware(h).name for h in hardware], batch, seq)
    return [
        Verdict("order", model, h, "prefill", b, s, NO_DATA, "", text, missing, calibrated=True) for h, b, s in where
    ]


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
