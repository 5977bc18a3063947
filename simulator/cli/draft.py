"""``prunesim draft``: speculative decoding with a pruned model as the draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.cli import options, parsing, render
from simulator.cli.options import option
from simulator.request import SETTINGS

if TYPE_CHECKING:
    from simulator.prediction.draft import Draft, Drafts


@dataclass(frozen=True)
class Drafting:
    draft: str | None = option(
        "MODEL", "Model of the draft, with the vocabulary of the target. Default: the target."
    )
    prune: str = option("TEXT", "Pruning of the draft, such as 'depth 0.5'.", "")
    target_prune: str = option("TEXT", "Pruning of the target.", "")
    drafted: str = option("LIST", "Tokens that the draft adds per round.", "1:8:1")
    acceptance: str = option(
        "LIST", "Probabilities with which the target accepts a drafted token.", "0.6:0.9"
    )
    by_position: str | None = option(
        "LIST", "Measured acceptances of the first, second, ... drafted token instead."
    )


# decode has none
_OTHERS = ("phase", "new_tokens", "cached_prefix", "token_budget", "ideal", "dense_s")
STEP: options.Run = options.run_options(*(name for name in SETTINGS if name not in _OTHERS))


@options.expanded("figure")
def command(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    drafting: Drafting = Drafting(),
    run: options.Run = STEP,
    out: options.Output = options.OUTPUT,
) -> None:
    """Predict speculative decoding with a pruned model as the draft.

    The target checks the tokens of the draft, so the output stays that of the target. Prints by
    batch the speedup over plain decoding of the dense target at the best number of drafted tokens,
    and the acceptance from which this is a gain. --json and --csv have all numbers of drafted
    tokens.
    """
    out.check()
    from simulator.prediction.draft import draft

    measured = drafting.by_position
    found = draft(
        model,
        drafting.prune,
        devices.one,
        draft=drafting.draft,
        target_prune=drafting.target_prune,
        drafted=parsing.integers("--drafted", drafting.drafted),
        acceptance=parsing.fractions("--acceptance", drafting.acceptance),
        by_position=parsing.fractions("--by-position", measured) if measured else (),
        **options.single(run.asked().settings, "batch"),
    )
    if out.write([vars(row) for row in found]):
        render.conclude(*sentences(found))
        _print(found, out.verbose)
    render.notes(found.notes, out.verbose)


def sentences(found: Drafts) -> list[str]:
    """Return the conclusion: the speedup at the smallest batch, and from which acceptance the draft
    pays."""
    from simulator.prediction.requests import device_text
    from simulator.prediction.wording import gain_text

    best, batches = found.best(), list(dict.fromkeys(row.batch for row in found))
    row = max((r for r in best if r.batch == batches[0]), key=lambda r: r.acceptance)
    least = min((r for r in best if r.batch == batches[0]), key=lambda r: r.acceptance)
    speed = gain_text(found.target, row.speedup, row.speedup_lower, row.speedup_upper)
    where = f"on {device_text(found)} in {found.engine} (batch {row.batch}, seq {found.seq})"
    at = f"an acceptance of {row.acceptance:.3g}"
    at += f" ({render.ratio(least.speedup)}x at {least.acceptance:.3g})" if least is not row else ""
    first = (
        f"{found.draft} as a draft {speed} {where}, with {row.drafted} tokens drafted per round at"
        f" {at}"
    )
    pruned = " pruned by " in found.target  # then the gain is over the dense target
    first += ", compared with the dense target" if pruned else ""
    first += (
        ""
        if row.fits
        else f"; they need {render.size(row.memory_bytes)} per device, more than it has"
    )
    who, pay = ("both together", "pay") if pruned else ("it", "pays")
    pays = {batch: _pays(found, batch) for batch in (batches[0], batches[-1])}
    second = "; ".join(
        f"at batch {batch} {who} "
        + (f"never {pay}" if row is None else f"{pay} from an acceptance of {_from(row)}")
        for batch, row in pays.items()
    )
    return [f"{first}. {second[0].upper()}{second[1:]}."]


def _pays(found: Drafts, batch: int) -> Draft | None:
    """Return the row of a batch that pays from the lowest acceptance, or None."""
    rows = [row for row in found if row.batch == batch and row.pays_from is not None]
    return min(rows, key=lambda row: row.pays_from or 0.0, default=None)


def _from(row: Draft) -> str:
    ends = (row.pays_from_lower, row.pays_from_upper)
    low, high = (
        fallback if end is None else end for end, fallback in zip(ends, (0.0, 1.0), strict=True)
    )
    return f"{row.pays_from:.2f} ({low:.2f}-{high:.2f})"


def _speedup(row: Draft) -> str:
    low, high = render.ratio(row.speedup_lower), render.ratio(row.speedup_upper)
    return f"{render.ratio(row.speedup)} ({low}-{high})"


def _print(found: Drafts, verbose: bool) -> None:
    rows: dict[int, list[Draft]] = {}
    for row in found if verbose else found.best():
        rows.setdefault(row.batch, []).append(row)
    if verbose:
        _print_all([row for several in rows.values() for row in several])
        return
    every = list(rows.values())
    columns = render.columns(every, ("batch", lambda r: r[0].batch))
    for i, one in enumerate(every[0]):
        title = f"accepted {render.percent(one.acceptance)}\nspeedup, tokens"
        cells = [f"{_speedup(r[i])} {r[i].drafted}" for r in every]
        columns.append(render.Column(title, cells))
    paying = [_pays(found, batch) for batch in rows]
    columns.append(
        render.Column("pays from\nacceptance", ["never" if r is None else _from(r) for r in paying])
    )
    columns += render.columns(
        every,
        ("dense\nstep", lambda r: render.seconds(r[0].dense_s)),
        ("pass of\nthe draft", lambda r: render.seconds(r[0].draft_s)),
        (
            "memory\nof both",
            lambda r: render.size(r[0].memory_bytes) + ("" if r[0].fits else " too large"),
        ),
    )
    render.show(render.narrowed(columns, 2 + len(every[0])))
    print(
        f"\nintervals of {render.percent(found.level)}; tokens: the number drafted per round that"
        " is fastest"
    )


def _print_all(rows: Sequence[Draft]) -> None:
    columns = render.columns(
        rows,
        ("batch", "batch"),
        ("accepted", "acceptance", render.percent),
        ("drafted", lambda r: f"{r.drafted}{' *' if r.best else ''}"),
        ("tokens\nper round", lambda r: f"{r.tokens:.2f}"),
        ("speedup", _speedup),
        ("pays from\nacceptance", lambda r: "never" if r.pays_from is None else _from(r)),
        ("check", "check_s", render.seconds),
    )
    render.show(columns, "* fastest")
