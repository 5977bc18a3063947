"""``prunesim speedup`` and ``explain``: print predicted speedups, and the steps from a nominal to a
predicted one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from typing import TYPE_CHECKING

from simulator.cli import options, parsing, render
from simulator.cli.options import option
from simulator.display import as_plain, with_and
from simulator.errors import InputError
from simulator.units import parse_ratio

if TYPE_CHECKING:
    from simulator.prediction.explain import Explanation
    from simulator.prediction.result import Result, Results
    from simulator.prediction.runnable import Runnable
    from simulator.prediction.speedup_sentences import BreakEven
    from simulator.prediction.tariff import Tariff

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
    memory: bool = option(None, "Also show memory against the device's capacity.", False),
    claim: str | None = option(
        "X", "A claimed speedup, such as 2.1: its probability, bound, explanation."
    ),
    metered: options.Metered = options.METERED,
    out: options.Output = options.OUTPUT,
) -> None:
    """Predict how much faster a pruned model is.

    Begins with the answer. Every combination of the lists is predicted. Over a range of batches or
    lengths (--batch 1:64) it states from which value each pruning pays. A combination that a family
    does not support (2:4 at 0.25) is excluded with a note, or an error if it is the only one. With
    --pruned, existing models are compared with the dense one. --claim judges a stated speedup of
    one prediction.
    """
    out.check()
    claimed = None if claim is None else parsing.checked("--claim", claim, parse_ratio)
    from simulator.prediction.energy_sentences import energy_notes
    from simulator.prediction.notes import uncalibrated
    from simulator.prediction.speedup_sentences import records
    from simulator.prediction.table import table

    tariff = metered.tariff
    asked, profiles = run.asked(model, devices, prunings), devices.profiles
    found = table(model, profiles, **prunings.parsed(), **asked.settings)
    # --family prints no "will it run" lines; --json has them
    answers: list[Runnable] = []
    if out.json or out.csv or prunings.named:
        from simulator.prediction.runnable import runnables

        answers = runnables(found, profiles if prunings.named else ())
    rows = records(found, answers, tariff)
    judged = None
    if claimed is not None:
        from simulator.prediction.claims import Claim, judge

        judged = judge(Claim.of(claimed, found, profiles))
        rows = [{**row, **judged.to_dict()} for row in rows]
    if out.write(rows):
        if judged is not None:
            from simulator.cli.claims import print_judgement

            print_judgement(judged, judged.unlikely)
            print()
        _print(found, answers if prunings.named else (), memory, tariff, out.verbose)
    if out.figure:
        from simulator.figures.energy import energies_of
        from simulator.figures.speedup import speedups_of

        named = [replace(r, family=r.name) for r in found]
        out.draw(lambda: energies_of(named, tariff) if tariff else speedups_of(named))
    defaults = uncalibrated(found, asked.settings.get("dense_s") is not None)
    render.notes(
        (*asked.notes, *energy_notes(tariff, profiles), *defaults, *found.notes), out.verbose
    )


def _print(
    found: Results,
    answers: Sequence[Runnable],
    memory: bool,
    tariff: Tariff | None,
    verbose: bool,
) -> None:
    """Print the conclusion, tables, what is removed of each part, and whether it runs."""
    from simulator.prediction.energy_sentences import of_energy
    from simulator.prediction.speedup_sentences import MOST_BREAK_EVEN, answer_of, break_even

    even = break_even(found.rows)
    over = (
        max((len(b.values) for b in even), default=0) >= MOST_COLUMNS
        or 0 < len(even) <= MOST_BREAK_EVEN
    )
    answer = answer_of(found.rows, answers, [_fitting(r) for r in found] if memory else ())
    render.conclude(*answer, *(of_energy(found.rows, tariff) if tariff else ()))
    if over:
        _print_over(even)
    if not over or verbose or memory or found[0].new_tokens:
        if over:
            print()
        _print_tables([replace(r, family=r.printed_name) for r in found], memory)
        level = render.percent(found[0].level)
        print(f"\ntimes and speedups with {level} intervals; bounds exclude work that pruning adds")
    if tariff:
        _print_energy(found.rows, tariff)
    if answers:
        _print_parts(found, answers)


def _fitting(r: Result) -> str:
    return f"; up to {r.pruned_largest_batch:,} sequences fit (dense: {r.dense_largest_batch:,})"


def _print_over(even: Sequence[BreakEven]) -> None:
    """Print speedups over batches or lengths: a table per device, engine and phase, a column per
    pruning."""
    from simulator.prediction.requests import batch_name, by_key

    groups = by_key(even, lambda b: b.where)
    together = max(1, (render.width() - AXIS_COLUMNS) // PRUNING_COLUMNS)
    tables = [
        (where, of_device[i : i + together])
        for where, of_device in groups.items()
        for i in range(0, len(of_device), together)
    ]
    for where, some in render.between(tables):
        first = some[0].results[0]
        axis = batch_name(first.phase) if some[0].axis == "batch" else "seq"
        render.show(_over_columns(some, axis), f"{first.model} on {where}: speedup over {axis}")


def _over_columns(some: Sequence[BreakEven], axis: str) -> list[render.Column]:
    values = sorted({value for b in some for value in b.values})
    results = [dict(zip(b.values, b.results)) for b in some]
    dense = [next(by_value[v] for by_value in results if v in by_value) for v in values]
    columns = render.columns(
        list(zip(values, dense)),
        (axis, lambda row: f"{row[0]:,}"),
        ("dense", lambda row: _dense_text(row[1])),
    )
    for by_value in results:
        pruning = next(iter(by_value.values())).pruning
        title = "\n".join(textwrap.wrap(pruning, 17, break_on_hyphens=False))
        cells = [render.interval(by_value[v]) if v in by_value else "-" for v in values]
        styles = [_style(by_value.get(v)) for v in values]
        columns.append(render.Column(title, cells, styles=styles))
    return columns


def _dense_text(r: Result, *, short: bool = False) -> str:
    return render.seconds_between(r.dense_s, r.dense_lower, r.dense_upper, short=short)


def _print_parts(found: Results, answers: Sequence[Runnable]) -> None:
    """Print once per pruning what it removes of each part, and once per engine whether the engine
    runs it."""
    from simulator.prediction.wording import parts_line

    lines = dict.fromkeys(
        f"{r.pruning}: {parts_line(r)}." for r in found if r.parts and not r.in_formats
    )
    # a request that does not run, else the first: the others differ only in a gain
    runs: dict[str, Runnable] = {}
    for r, answer in zip(found, answers):
        name = f"{r.pruning} in {r.engine}"
        if r.in_formats and answer.works and answer.aligned:
            continue
        runs[name] = answer if name not in runs or answer.works is False else runs[name]
    print()
    for line in (
        *lines,
        *(f"{name}: will it run? {answer.sentence}" for name, answer in runs.items()),
    ):
        render.say(line, "  ")


def _print_tables(results: Sequence[Result], memory: bool) -> None:
    """Print one table per request, rows by family and sparsity, devices and their numbers side by
    side."""
    from simulator.prediction.requests import by_key, device_text

    first = True
    counts = {r.devices: r.parallel for r in results}
    if len(counts) > 1:
        results = [replace(r, hardware=device_text(r)) for r in results]
    scenario = partial(_scenario, counts=counts)
    for title, group in by_key(results, scenario).items():
        for part in _chunks(group):
            if not first:
                print()
            layouts = (speedup_columns(part, detail) for detail in range(MOST_DETAIL, -1, -1))
            render.show(render.first_fitting(layouts), title)
            first = False
        if group[0].new_tokens:
            print()
            _print_serving(group)
        if memory:
            print()
            _print_memory(group)


def _scenario(r: Result, counts: Mapping[int, str]) -> str:
    """Return the scenario of a result with all numbers of devices, and how they share the model."""
    if len(counts) == 1:
        return r.scenario
    numbers = with_and([str(count) for count in counts])
    return f"{replace(r, devices=1).scenario}, {numbers} devices ({counts[max(counts)]})"


def _chunks(results: Sequence[Result]) -> Iterator[list[Result]]:
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
            render.table_width(speedup_columns(part, 1)) <= render.width() for part in parts
        ):
            yield from parts
            return


@dataclass(frozen=True)
class _Crossed:
    """Results by device and by row, which is a family and a sparsity."""

    results: Sequence[Result]

    @cached_property
    def hardware(self) -> list[str]:
        return list(dict.fromkeys(r.hardware for r in self.results))

    @cached_property
    def rows(self) -> list[tuple[str, float]]:
        return list(dict.fromkeys((r.family, r.sparsity) for r in self.results))

    @cached_property
    def _cells(self) -> dict[tuple[str, tuple[str, float]], Result]:
        return {(r.hardware, (r.family, r.sparsity)): r for r in self.results}

    def on(self, device: str) -> list[Result | None]:
        """Return the result of each row on a device."""
        return [self._cells.get((device, row)) for row in self.rows]

    def first_on(self, device: str) -> Result:
        return next(r for r in self.results if r.hardware == device)

    @property
    def any_of(self) -> list[Result]:
        """A result of each row."""
        columns = [self.on(device) for device in self.hardware]
        return [next(filter(None, cells)) for cells in zip(*columns)]


MOST_DETAIL = 7  # most detail of a table of speedups; each step down omits or shortens a column


def speedup_columns(results: Sequence[Result], detail: int) -> list[render.Column]:
    """Return a table of speedups; the first row is the dense model. ``detail`` is from 0, the
    narrowest, to :data:`MOST_DETAIL`."""
    table = _Crossed(results)
    columns = _row_columns(table, detail)
    for device in table.hardware:
        columns += _device_columns(table, device, detail)
    return columns


def _row_columns(table: _Crossed, detail: int) -> list[render.Column]:
    """Return the columns that the devices share."""
    first = {name: table.rows.index((name, s)) for name, s in reversed(table.rows)}
    labels = [name if first[name] == i else "" for i, (name, _) in enumerate(table.rows)]
    described = (
        (0, ("pruned", "sparsity", render.percent)),
        (5, ("realised", "realised_sparsity", render.percent)),
        (0, ("FLOP\nbound", "flop_bound", render.ratio)),
        (3, ("byte\nbound", "byte_bound", render.ratio)),
    )
    shown = (column for least, column in described if detail >= least)
    shared = render.columns(table.any_of, *shown)
    return [
        render.Column(_kind(table.results), ["dense", *labels], right=False),
        *(render.Column(c.title, ["", *c.cells]) for c in shared),
    ]


def _device_columns(table: _Crossed, device: str, detail: int) -> list[render.Column]:
    results, columns = table.on(device), list[render.Column]()
    if detail >= 6:
        bounds = [render.ratio(r.roofline_bound) if r else "-" for r in results]
        columns.append(render.Column("roofline\nbound", ["", *bounds]))
    if detail >= 7:
        times = [render.seconds(r.pruned_s) if r else "-" for r in results]
        columns.append(render.Column(f"{device}\ntime", ["", *times]))
    text = render.interval if detail else lambda r: render.ratio(r.speedup)
    dense = table.first_on(device)
    dense_s = _dense_text(dense, short=len(table.hardware) > 1)
    cells = [
        dense_s if detail else render.seconds(dense.dense_s),
        *(text(r) if r else "-" for r in results),
    ]
    styles = ["", *map(_style, results)]
    columns.append(render.Column(f"{device}\nspeedup", cells, styles=styles))
    if detail >= 2:
        short = render.BOTTLENECKS_SHORT if detail <= 3 else {}
        names = [r.bottleneck if r else "" for r in results]
        columns.append(
            render.Column(
                "bottle-\nneck", ["", *(short.get(name, name) for name in names)], right=False
            )
        )
    return columns


def _kind(results: Sequence[Result]) -> str:
    if results[0].pruned or results[0].method:
        return "model" if results[0].pruned else "method"
    # a row shows a text of --prune
    return "pruning" if any(r.family == r.prune for r in results) else "family"


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
    devices = dict.fromkeys(r.hardware for r in results)
    for device in render.between(devices):
        some = [r for r in results if r.hardware == device]
        render.show(_serving_columns(some), f"{device}: new tokens{waits}")


def _serving_columns(results: Sequence[Result]) -> list[render.Column]:
    dense = results[0]
    names = ("tokens_per_s", "ttft_s", "tpot_s")
    rows = [
        (*(getattr(dense, f"dense_{name}") or 0.0 for name in names), dense.dense_largest_batch),
        *((*(getattr(r, n) or 0.0 for n in names), r.pruned_largest_batch) for r in results),
    ]
    return [
        render.Column(_kind(results), ["dense", *(r.family for r in results)], right=False),
        render.Column("pruned", ["", *(render.percent(r.sparsity) for r in results)]),
        *render.columns(
            rows,
            ("tokens/s\nper GPU", lambda row: f"{row[0] / dense.devices:,.0f}"),
            ("time to\nfirst token", lambda row: render.seconds(row[1])),
            ("time per\noutput token", lambda row: render.seconds(row[2])),
            ("largest batch\nthat fits", lambda row: f"{row[3]:,}"),
        ),
    ]


def _print_energy(results: Sequence[Result], tariff: Tariff) -> None:
    """Print energy per token: a table per kind of token, or several if its columns do not fit."""
    from simulator.prediction.energy_sentences import energy_table, token_name
    from simulator.prediction.requests import batch_name, by_key

    fields = ("model", "hardware", "engine", "phase", "batch", "seq")
    for token, some in by_key(results, token_name).items():
        names = [
            render.Column(batch_name(some[0].phase) if name == "batch" else name, cells)
            for name in fields
            if len({*(cells := [str(getattr(r, name)) for r in some])}) > 1
        ]
        names.append(render.Column("pruning", [r.pruning for r in some], right=False))
        energy = [render.Column(*column) for column in energy_table(some, tariff).items()]
        render.show_in_parts(names, energy, f"energy per {token}")


def _print_memory(results: Sequence[Result]) -> None:
    table, first = _Crossed(results), results[0]
    needs = [first.dense_memory_bytes, *(r.pruned_memory_bytes for r in table.any_of)]
    columns = [
        render.Column(_kind(results), ["dense", *(name for name, _ in table.rows)], right=False),
        render.Column("pruned", ["", *(render.percent(s) for _, s in table.rows)]),
        render.Column("memory", [render.size(need) for need in needs]),
    ]
    for device in table.hardware:
        columns += _memory_columns(table, device)
    per_device = " of each device" if first.devices > 1 else ""
    render.show(render.narrowed(columns, 4), f"memory{per_device}: weights, cache, activations")


def _memory_columns(table: _Crossed, device: str) -> list[render.Column]:
    dense, pruned = table.first_on(device), table.on(device)
    words = {True: "fits", False: "too large"}
    fits = [words[dense.dense_fits], *(words[r.pruned_fits] if r else "-" for r in pruned)]
    most = [dense.dense_largest_batch, *(r and r.pruned_largest_batch for r in pruned)]
    texts = ["-" if batch is None else f"{batch:,}" for batch in most]
    return [
        render.Column(f"{device}\n{render.size(dense.capacity_bytes)}", fits, right=False),
        render.Column("largest\nbatch", texts),
    ]


@dataclass(frozen=True)
class Explained(options.Prunings):
    family: str | None = option("NAME", "One pruning family, with one --sparsity.")


@options.expanded("csv")
def explain(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = Explained(),
    run: options.Run = options.RUN,
    roofline: str | None = option(
        "FILE", "Also draw the layers' GEMMs, dense and pruned, on the roofline."
    ),
    target: str | None = option("X", "Speedup of the kernel budget, such as 1.2. Default: 1."),
    metered: options.Metered = options.METERED,
    out: options.Output = options.OUTPUT,
) -> None:
    """Explain where a nominal speedup is lost.

    Begins with nominal speedup, predicted speedup and largest losses in a sentence. The kernel
    budget of a dynamic pruning follows: how long its added work may take, how fast its kernels must
    be, and from which batch, length and sparsity it pays. Named steps lead from the nominal speedup
    1/(1 - s) to the predicted one; their factors multiply exactly. Several engines are shown side
    by side. A table by operator has the times of both models, and why an operator differs from its
    roofline bound. With more than three predictions only the conclusions are printed, and the
    tables with --verbose.
    """
    out.check(roofline)
    if prunings.family is not None and "," in prunings.family:
        raise InputError(f"--family {prunings.family!r}: expected one family to explain")
    from simulator.prediction.advise import Target
    from simulator.prediction.by_operator import by_operator
    from simulator.prediction.energy_sentences import energy_notes, of_energy
    from simulator.prediction.explain import explanations
    from simulator.prediction.explain_sentences import budget_text, conclusion, conclusions
    from simulator.prediction.prunings import readable
    from simulator.prediction.requests import by_key
    from simulator.prediction.tariff import energy_fields
    from simulator.prediction.wording import MOST_SENTENCES

    tariff = metered.tariff
    asked, given = run.asked(model, devices, prunings), prunings.parsed()
    given["pruned"], skipped = readable(given.get("pruned", ()))
    excluded: dict[str, InputError] = {}
    aim = None if target is None else parsing.checked("--target", target, parse_ratio)
    speedup = 1.0 if aim is None else Target(aim).speedup or 1.0
    found = explanations(model, devices.profiles, excluded, speedup, **given, **asked.settings)
    rows = [
        {
            **e.result.to_dict(),
            "waterfall": [asdict(step) for step in e.steps],
            "conclusion": conclusion(e),
            "operators": [asdict(one) for one in by_operator(e)],
            "budget": as_plain(e.budget),
            **energy_fields(e.result, tariff),
            **({"energy_parts": e.energy_parts} if tariff else {}),
        }
        for e in (found if out.json else ())
    ]
    if out.write(rows):
        energy = of_energy([e.result for e in found], tariff) if tariff else ()
        render.conclude(*conclusions(found), *energy)
        many = len(found) > MOST_SENTENCES
        if many:
            for e in found:
                render.conclude(conclusion(e), budget_text(e) if out.verbose else "")
        # engines side by side
        same = attrgetter(
            *(f"result.{name}" for name in ("hardware", "phase", "batch", "seq", "pruning"))
        )
        groups = by_key(found if out.verbose or not many else (), same)
        for together in render.between(groups.values()):
            _print_waterfalls(together)
            for e in together:
                _print_operators(e)
            if tariff:
                _print_energy([e.result for e in together], tariff)
                _print_energy_parts(together)
        lines = [*asked.notes, *energy_notes(tariff, devices.profiles), *skipped, *excluded]
        render.notes([*lines, *_notes(found)], out.verbose)
    if out.figure or roofline:
        from simulator.figures.gemms import rooflines_of
        from simulator.figures.waterfall import waterfalls_of

        if out.figure:
            out.draw(lambda: waterfalls_of(found))
        if roofline:
            out.draw(lambda: rooflines_of(found), roofline)


def _notes(found: Sequence[Explanation]) -> list[str]:
    from simulator.prediction.notes import (
        assumed_link,
        difference_lines,
        experts_assumed,
        inferred_line,
        overridden,
        related_kernels,
        uncalibrated,
    )
    from simulator.prediction.prunings import source_of

    lines = []
    for e in found:
        if e.inferred is not None and e.request.dense_s is not None:
            lines.append(inferred_line(e.inferred, e.hardware.label, e.request.dense_s))
    lines += uncalibrated(e.result for e in found)
    assumed = (
        note
        for e in found
        for note in (
            assumed_link(e.hardware, e.dense),
            experts_assumed(e.dense),
            related_kernels(e.hardware, e.dense),
        )
    )
    lines += dict.fromkeys(filter(None, assumed))
    for e in found:
        lines += overridden(e.dense.meta.asked, map(source_of, (e.dense, e.pruned)))
    for e in found:  # the line of removed parts has the difference of other prunings
        dense = e.dense.meta.config
        lines += difference_lines(dense, e.pruned.meta.config if e.result.pruned else dense)
    return lines


def _print_waterfalls(together: Sequence[Explanation]) -> None:
    """Print the waterfalls of some engines next to each other, with times and bounds."""
    from simulator.prediction.wording import parts_line

    r = together[0].result
    title = replace(r, engine=", ".join(e.result.engine for e in together)).scenario
    name = f"{r.pruning} ({r.family})" if r.pruned or r.method not in ("", r.family) else r.pruning
    render.show(_step_columns(together), f"{name}, {r.hardware}: {title}")
    if r.parts:
        print()
        render.say(f"removed: {parts_line(r)}", "  ")
    print()
    for one in (e.result for e in together):
        pruned = render.seconds_between(one.pruned_s, one.pruned_lower, one.pruned_upper)
        engine = f"{one.engine}: " if len(together) > 1 else ""
        print(f"{engine}dense {_dense_text(one)}, pruned {pruned}")
    r = together[-1].result
    print(
        f"bounds: FLOP {r.flop_bound:.3f}, byte {r.byte_bound:.3f}, roofline {r.roofline_bound:.3f}"
    )


def _print_operators(e: Explanation) -> None:
    """Print the times of the operators in a dense and a pruned pass, and what loses speedup."""
    from simulator.prediction.by_operator import by_operator

    columns = render.columns(
        by_operator(e),
        ("<operator", "name"),
        ("dense", "dense_s", render.seconds),
        ("pruned", "pruned_s", render.seconds),
        ("speedup", lambda one: _ratio(one.dense_s, one.pruned_s)),
        ("roofline\nbound", lambda one: render.ratio(one.bound) if one.bound > 0.0 else "-"),
        ("<cause", "cause"),
    )
    print()
    render.show(columns, f"{e.result.engine}: time by operator")


def _ratio(dense_s: float, pruned_s: float) -> str:
    return render.ratio(dense_s / pruned_s) if pruned_s > 0.0 else "-"


def _print_energy_parts(together: Sequence[Explanation]) -> None:
    """Print what draws the power of a pass."""
    for e in together:
        parts = [*e.energy_parts.items(), ("sum", [e.result.dense_joules, e.result.pruned_joules])]
        columns = render.columns(
            parts,
            ("<part", lambda row: row[0]),
            ("dense (J)", lambda row: f"{row[1][0]:.3g}"),
            ("pruned (J)", lambda row: f"{row[1][1]:.3g}"),
            ("saved", lambda row: render.percent(1.0 - row[1][1] / row[1][0])),
        )
        print()
        render.show(columns, f"{e.result.engine}: energy of a pass on all devices")


def _step_columns(together: Sequence[Explanation]) -> list[render.Column]:
    steps = together[0].steps
    columns = [render.Column("step", [step.name for step in steps], right=False)]
    for e in together:
        above = f"{e.result.engine}\n" if len(together) > 1 else ""
        factors = ["", *(f"x{step.factor:.3f}" for step in e.steps[1:])]
        styles = ["", *(_color(step.factor) for step in e.steps[1:])]
        columns.append(render.Column(f"{above}factor", factors, styles=styles))
        speedups = [f"{step.speedup:.3f}" for step in e.steps]
        columns.append(render.Column(f"{above}speedup", speedups))
    room = render.width() - render.table_width(columns) - 2
    if room >= 20:
        notes = [step.note for step in steps]
        cut = [note if len(note) <= room else f"{note[: room - 3].rstrip()}..." for note in notes]
        columns.append(render.Column("meaning", cut, right=False))
    return columns


def _color(factor: float) -> str:
    from simulator.prediction.explain_sentences import NOTABLE

    return "red" if factor < NOTABLE else "green" if factor > 1 / NOTABLE else ""
