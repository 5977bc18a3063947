"""``prunesim speedup`` and ``explain``: print predicted speedups, and the steps from a nominal to a
predicted one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.prediction.explain import Explanation
    from simulator.prediction.result import Result, Results
    from simulator.prediction.runnable import Runnable
    from simulator.prediction.sentences import BreakEven

# most sentences on break-even; of more prunings only the fastest is stated
MOST_SENTENCES = 8

MOST_COLUMNS = 3  # from so many batches or lengths on, they are rows of one table

# characters of the first two columns of a table over batches or lengths, and of the column of a
# pruning
AXIS_COLUMNS, PRUNING_COLUMNS = 30, 19


@options.expanded()
def speedup(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = options.PRUNINGS,
    run: options.Run = options.RUN,
    memory: Annotated[
        bool, opt("--memory", None, "Also show memory against the device's capacity.")
    ] = False,
    out: options.Output = options.OUTPUT,
) -> None:
    """Predict how much faster a pruned model is.

    Begins with the answer. Every combination of the lists is predicted. Over a range of batches or
    lengths (--batch 1:64) it states from which value each pruning pays. A combination that a family
    does not support (2:4 at 0.25) is excluded with a note, or an error if it is the only one. With
    --pruned, existing models are compared with the dense one.
    """
    output = render.Output(out.json, out.csv, [out.figure])
    from simulator.prediction.sentences import uncalibrated
    from simulator.prediction.table import table

    asked, profiles = run.asked(model, devices, prunings), devices.profiles
    found = table(model, profiles, **prunings.parsed(), **asked.settings)
    # --family prints no "will it run" lines; --json has them
    answers: list[Runnable] = []
    if out.json or out.csv or prunings.named:
        from simulator.prediction.runnable import runnables

        answers = runnables(found, profiles if prunings.named else ())
    if output.write([{**r.to_dict(), **answer.to_dict()} for r, answer in zip(found, answers)]):
        _print(found, answers if prunings.named else (), memory, out.verbose)
    if out.figure:
        from simulator.figures.speedup import speedups_of
        from simulator.figures.style import save_figure

        save_figure(speedups_of([replace(r, family=r.name) for r in found]), out.figure)
    defaults = uncalibrated(found, asked.settings.get("dense_s") is not None)
    render.notes((*asked.notes, *defaults, *found.notes), out.verbose)


def _print(found: Results, answers: Sequence[Runnable], memory: bool, verbose: bool) -> None:
    """Print the conclusion, tables, what is removed of each part, and whether it runs."""
    from simulator.prediction.sentences import break_even, of_speedups, runs_clause

    even = break_even(found.rows)
    runs = dict(zip(found.rows, answers))
    over = (
        max((len(b.values) for b in even), default=0) >= MOST_COLUMNS
        or 0 < len(even) <= MOST_SENTENCES
    )
    if over and (verbose or len(even) <= MOST_SENTENCES):
        # the longest: a budget of tokens may keep all of the first
        last = [runs.get(b.results[-1]) for b in even]
        stops = [runs_clause(answer) if answer and answer.works is False else "" for answer in last]
        render.conclude(*(f"{b.sentence[:-1]}{stop}." for b, stop in zip(even, stops)))
    else:
        clauses = [_clauses(r, runs.get(r), memory) for r in found.rows]
        render.conclude(*of_speedups(found.rows, clauses))
    if over:
        _print_over(even)
    if not over or verbose or memory or found[0].new_tokens:
        if over:
            print()
        _print_tables([replace(r, family=r.name) for r in found], memory)
        level = render.percent(found[0].level)
        print(f"\ntimes and speedups with {level} intervals; bounds exclude work that pruning adds")
    if answers:
        _print_parts(found, answers)


def _clauses(r: Result, answer: Runnable | None, memory: bool) -> str:
    from simulator.prediction.sentences import runs_clause, unaligned

    runs = runs_clause(answer) if answer else ""
    if answer and answer.works and not answer.aligned:
        runs += f", but {unaligned(answer)}"
    fit = f"; up to {r.pruned_largest_batch:,} sequences fit (dense: {r.dense_largest_batch:,})"
    return runs + (fit if memory else "")


def _print_over(even: Sequence[BreakEven]) -> None:
    """Print speedups over batches or lengths: a table per device, engine and phase, a column per
    pruning."""
    from simulator.prediction.requests import batch_name, by_key

    groups = by_key(even, lambda b: b.where)
    together = max(1, (render.width() - AXIS_COLUMNS) // PRUNING_COLUMNS)
    tables = [
        (where, all_of[i : i + together])
        for where, all_of in groups.items()
        for i in range(0, len(all_of), together)
    ]
    for i, (where, some) in enumerate(tables):
        if i:
            print()
        values = sorted({value for b in some for value in b.values})
        at = [dict(zip(b.values, b.results)) for b in some]
        dense = [next(found[v] for found in at if v in found) for v in values]
        first = some[0]
        axis = batch_name(dense[0].phase) if first.axis == "batch" else "seq"
        columns = [
            render.Column(axis, [f"{v:,}" for v in values]),
            render.Column(
                "dense",
                [render.seconds_between(r.dense_s, r.dense_lower, r.dense_upper) for r in dense],
            ),
        ]
        for b, found in zip(some, at):
            cells = [render.interval(found[v]) if v in found else "-" for v in values]
            title = "\n".join(textwrap.wrap(b.results[0].pruning, 17, break_on_hyphens=False))
            columns.append(
                render.Column(title, cells, styles=[_style(found.get(v)) for v in values])
            )
        render.show(columns, f"{first.results[0].model} on {where}: speedup over {axis}")


def _print_parts(found: Results, answers: Sequence[Runnable]) -> None:
    """Print once per pruning what it removes of each part, and once per engine whether the engine
    runs it."""
    from simulator.prediction.sentences import parts_line

    lines = dict.fromkeys(f"{r.pruning}: {parts_line(r)}." for r in found if r.parts)
    # a request that does not run, else the first: the others differ only in a gain
    runs: dict[str, Runnable] = {}
    for r, answer in zip(found, answers):
        name = f"{r.pruning} in {r.engine}"
        runs[name] = answer if name not in runs or answer.works is False else runs[name]
    print()
    for line in (
        *lines,
        *(f"{name}: will it run? {answer.sentence}" for name, answer in runs.items()),
    ):
        print(textwrap.fill(line, render.width(), subsequent_indent="  ", break_on_hyphens=False))


def _print_tables(results: Sequence[Result], memory: bool) -> None:
    """Print one table per request, rows by family and sparsity, devices side by side."""
    from simulator.prediction.requests import by_key

    available = render.width()
    first = True
    for title, group in by_key(results, lambda r: r.scenario).items():
        for part in _chunks(group, available):
            if not first:
                print()
            render.show(render.first_fitting(speedup_layouts(part), available), title)
            first = False
        if group[0].new_tokens:
            print()
            _print_serving(group)
        if memory:
            print()
            _print_memory(group)


def _chunks(results: Sequence[Result], available: int) -> Iterator[list[Result]]:
    """Split results into tables of as many devices as fit in the narrowest layout with intervals,
    equally many each."""
    names = list(dict.fromkeys(r.hardware for r in results))
    for tables in range(1, len(names) + 1):
        count = -(-len(names) // tables)
        parts = [
            [r for r in results if r.hardware in names[i : i + count]]
            for i in range(0, len(names), count)
        ]
        if count == 1 or all(
            render.table_width(list(speedup_layouts(part))[-2]) <= available for part in parts
        ):
            yield from parts
            return


def speedup_layouts(results: Sequence[Result]) -> Iterator[list[render.Column]]:
    """Yield layouts of a speedup table from the most detailed to the narrowest; the first row is
    the dense model."""
    hardware, rows, at = _crossed(results)
    any_of = [next(at[h, row] for h in hardware if (h, row) in at) for row in rows]
    dense = {h: next(r for r in results if r.hardware == h) for h in hardware}
    first = {name: rows.index((name, s)) for name, s in reversed(rows)}
    labels = ["dense", *(name if first[name] == i else "" for i, (name, _) in enumerate(rows))]

    def layout(*, detail: int, bottleneck: str, interval: bool = True) -> list[render.Column]:
        shared = render.columns(
            any_of,
            ("pruned", lambda r: render.percent(r.sparsity)),
            ("realised", lambda r: render.percent(r.realised_sparsity)),
            ("FLOP\nbound", lambda r: render.ratio(r.flop_bound)),
            ("byte\nbound", lambda r: render.ratio(r.byte_bound)),
        )
        if detail < 2:
            del shared[1]
        if detail < 1:
            del shared[-1]
        columns = [render.Column(_kind(results), labels, right=False)]
        columns += [render.Column(c.title, ["", *c.cells]) for c in shared]
        for h in hardware:
            found = [at.get((h, row)) for row in rows]
            if detail > 2:
                bounds = [render.ratio(r.roofline_bound) if r else "-" for r in found]
                columns.append(render.Column("roofline\nbound", ["", *bounds]))
            if detail > 3:
                times = [render.seconds(r.pruned_s) if r else "-" for r in found]
                columns.append(render.Column(f"{h}\ntime", ["", *times]))
            shown = render.interval if interval else lambda r: render.ratio(r.speedup)
            ends = dense[h].dense_s, dense[h].dense_lower, dense[h].dense_upper
            short = len(hardware) > 1
            whole = (
                render.seconds_between(*ends, short=short) if interval else render.seconds(ends[0])
            )
            cells = [whole, *(shown(r) if r else "-" for r in found)]
            columns.append(
                render.Column(f"{h}\nspeedup", cells, styles=["", *(_style(r) for r in found)])
            )
            if bottleneck:
                names = render.BOTTLENECKS_SHORT if bottleneck == "short" else {}
                bottlenecks = [names.get(r.bottleneck, r.bottleneck) if r else "" for r in found]
                columns.append(render.Column("bottle-\nneck", ["", *bottlenecks], right=False))
        return columns

    for detail in (4, 3, 2, 1):
        yield layout(detail=detail, bottleneck="full")
    yield layout(detail=1, bottleneck="short")
    yield layout(detail=0, bottleneck="short")
    yield layout(detail=0, bottleneck="")
    yield layout(detail=0, bottleneck="", interval=False)


def _kind(results: Sequence[Result]) -> str:
    if results[0].pruned or results[0].method:
        return "model" if results[0].pruned else "method"
    # a row shows a text of --prune
    return "pruning" if any(r.family == r.prune for r in results) else "family"


def _crossed(
    results: Sequence[Result],
) -> tuple[list[str], list[tuple[str, float]], dict[Any, Result]]:
    """Return devices, rows (family, sparsity), and the result of each device and row."""
    hardware = list(dict.fromkeys(r.hardware for r in results))
    rows = list(dict.fromkeys((r.family, r.sparsity) for r in results))
    return hardware, rows, {(r.hardware, (r.family, r.sparsity)): r for r in results}


def _style(r: Result | None) -> str:
    """Return green if the whole interval is a gain, red if it is a loss."""
    if r is None:
        return ""
    return "green" if r.speedup_lower > 1.0 else "red" if r.speedup_upper < 1.0 else ""


def _print_serving(results: Sequence[Result]) -> None:
    waits = (
        "; time to first token depends on how requests arrive"
        if results[0].phase == "serve"
        else ""
    )
    for i, h in enumerate(dict.fromkeys(r.hardware for r in results)):
        mine = [r for r in results if r.hardware == h]
        first, rows = (
            mine[0],
            [(r.tokens_per_s, r.ttft_s, r.tpot_s, r.pruned_largest_batch) for r in mine],
        )
        rows = [
            (
                first.dense_tokens_per_s,
                first.dense_ttft_s,
                first.dense_tpot_s,
                first.dense_largest_batch,
            ),
            *rows,
        ]
        each = [(rate or 0.0) / first.devices for rate, *_ in rows]
        columns = [
            render.Column(_kind(mine), ["dense", *(r.family for r in mine)], right=False),
            render.Column("pruned", ["", *(render.percent(r.sparsity) for r in mine)]),
            render.Column("tokens/s\nper GPU", [f"{rate:,.0f}" for rate in each]),
            render.Column(
                "time to\nfirst token", [render.seconds(ttft or 0.0) for _, ttft, _, _ in rows]
            ),
            render.Column(
                "time per\noutput token", [render.seconds(tpot or 0.0) for _, _, tpot, _ in rows]
            ),
            render.Column("largest batch\nthat fits", [f"{largest:,}" for *_, largest in rows]),
        ]
        if i:
            print()
        render.show(columns, f"{h}: new tokens{waits}")


def _print_memory(results: Sequence[Result]) -> None:
    hardware, rows, at = _crossed(results)
    any_of = [next(at[h, row] for h in hardware if (h, row) in at) for row in rows]
    first = results[0]
    needs = [
        render.size(first.dense_memory_bytes),
        *(render.size(r.pruned_memory_bytes) for r in any_of),
    ]
    columns = [
        render.Column(_kind(results), ["dense", *(name for name, _ in rows)], right=False),
        render.Column("pruned", ["", *(render.percent(s) for _, s in rows)]),
        render.Column("memory", needs),
    ]
    words = {True: "fits", False: "too large"}
    for h in hardware:
        whole = next(r for r in results if r.hardware == h)
        found = [at.get((h, row)) for row in rows]
        fits = [words[whole.dense_fits], *(words[r.pruned_fits] if r else "-" for r in found)]
        most = [
            f"{whole.dense_largest_batch:,}",
            *(f"{r.pruned_largest_batch:,}" if r else "-" for r in found),
        ]
        columns.append(
            render.Column(f"{h}\n{render.size(whole.capacity_bytes)}", fits, right=False)
        )
        columns.append(render.Column("largest\nbatch", most))
    per_device = " of each device" if first.devices > 1 else ""
    render.show(render.narrowed(columns, 4), f"memory{per_device}: weights, cache, activations")


@dataclass(frozen=True)
class Explained(options.Prunings):
    family: Annotated[
        str | None, opt("--family", "NAME", "One pruning family, with one --sparsity.")
    ] = None


@options.expanded("csv")
def explain(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = Explained(),
    run: options.Run = options.RUN,
    roofline: Annotated[
        str | None,
        opt(
            "--roofline", "FILE", "Also draw the layers' GEMMs, dense and pruned, on the roofline."
        ),
    ] = None,
    out: options.Output = options.OUTPUT,
) -> None:
    """Explain where a nominal speedup is lost.

    Begins with nominal speedup, predicted speedup and largest losses in a sentence. Named steps
    lead from the nominal speedup 1/(1 - s) to the predicted one; their factors multiply exactly.
    Several engines are shown side by side. With more than three predictions only the sentences are
    printed, and the steps with --verbose.
    """
    output = render.Output(out.json, figures=[out.figure, roofline])
    if prunings.family is not None and "," in prunings.family:
        raise InputError(f"--family {prunings.family!r}: expected one family to explain")
    from simulator.prediction.explain import explanations
    from simulator.prediction.prunings import readable
    from simulator.prediction.requests import by_key
    from simulator.prediction.sentences import MOST_SENTENCES, conclusion, conclusions

    asked, given = run.asked(model, devices, prunings), prunings.parsed()
    given["pruned"], skipped = readable(given.get("pruned", ()))
    excluded: dict[str, InputError] = {}
    found = explanations(model, devices.profiles, excluded, **given, **asked.settings)
    rows = [
        {
            **e.result.to_dict(),
            "waterfall": [asdict(step) for step in e.steps],
            "conclusion": conclusion(e),
        }
        for e in found
    ]
    if output.write(rows):
        render.conclude(*conclusions(found))
        many = len(found) > MOST_SENTENCES
        if many:
            for e in found:
                print(
                    textwrap.fill(conclusion(e), render.width(), break_on_hyphens=False), end="\n\n"
                )
        # engines side by side
        same = attrgetter(
            *(f"result.{name}" for name in ("hardware", "phase", "batch", "seq", "pruning"))
        )
        groups = by_key(found if out.verbose or not many else (), same)
        for i, together in enumerate(groups.values()):
            if i:
                print()
            _print_waterfalls(together)
        render.notes([*asked.notes, *skipped, *excluded, *_notes(found)], out.verbose)
    if out.figure or roofline:
        from simulator.figures.gemms import rooflines_of
        from simulator.figures.style import save_figure
        from simulator.figures.waterfall import waterfalls_of

        if out.figure:
            save_figure(waterfalls_of(found), out.figure)
        if roofline:
            save_figure(rooflines_of(found), roofline)


def _notes(found: Sequence[Explanation]) -> list[str]:
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
    assumed = (
        note
        for e in found
        for note in (assumed_link(e.hardware, e.dense), experts_assumed(e.dense))
    )
    lines += dict.fromkeys(filter(None, assumed))
    return lines + [
        line for e in found for line in difference_lines(e.dense.meta.config, e.pruned.meta.config)
    ]


def _print_waterfalls(together: Sequence[Explanation]) -> None:
    """Print the waterfalls of some engines next to each other, with times and bounds."""
    from simulator.prediction.sentences import NOTABLE, parts_line

    available, first, several = render.width(), together[0], len(together) > 1
    names = [step.name for step in first.steps]
    columns = [render.Column("step", names, right=False)]
    for e in together:
        above = f"{e.result.engine}\n" if several else ""
        factors = ["", *(f"x{step.factor:.3f}" for step in e.steps[1:])]
        colors = [
            "red" if s.factor < NOTABLE else "green" if s.factor > 1 / NOTABLE else ""
            for s in e.steps[1:]
        ]
        columns.append(render.Column(f"{above}factor", factors, styles=["", *colors]))
        columns.append(
            render.Column(f"{above}speedup", [f"{step.speedup:.3f}" for step in e.steps])
        )
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
        print(
            textwrap.fill(
                f"removed: {parts_line(r)}",
                available,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
        )
    print()
    for e in together:
        r = e.result
        dense = render.seconds_between(r.dense_s, r.dense_lower, r.dense_upper)
        pruned = render.seconds_between(r.pruned_s, r.pruned_lower, r.pruned_upper)
        print(f"{f'{r.engine}: ' if several else ''}dense {dense}, pruned {pruned}")
    print(
        f"bounds: FLOP {r.flop_bound:.3f}, byte {r.byte_bound:.3f}, roofline {r.roofline_bound:.3f}"
    )
