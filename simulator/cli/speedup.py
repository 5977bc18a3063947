"""``prunesim speedup``: print predicted speedups as text, JSON, CSV or figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.predict.result import Result


Sparsity = Annotated[
    str | None,
    opt("--sparsity", "LIST", "Fractions removed, in [0, 1). Default: 0.1,0.25,0.5, or those of a method's paper."),
]


@options.expanded()
def speedup(
    model: options.Model,
    hardware: options.Hardware,
    family: Annotated[str | None, opt("--family", "LIST", "Pruning families. Default: all.")] = None,
    method: options.Method = None,
    pruned: options.Pruned = None,
    sparsity: Sparsity = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    option: options.Option = None,
    memory: Annotated[bool, opt("--memory", None, "Also show memory against the device's capacity.")] = False,
    same_stack: options.SameStack = False,
    json: options.Json = False,
    csv: Annotated[str | None, opt("--csv", "FILE", "Write CSV with exact numbers (- for standard output).")] = None,
    figure: options.Figure = None,
    verbose: options.Verbose = False,
) -> None:
    """Predict how much faster a pruned model is.

    Every combination of the lists is predicted. A combination that a family does not support (2:4 at 0.25) is excluded
    with a note, or an error if it is the only one. With --pruned, existing models are compared with the dense one.
    """
    output = render.Output(json, csv, [figure])
    chosen = None if family is None else options.names("--family", family)
    methods = [] if method is None else options.names("--method", method)
    extra = options.settings("--option", option)
    if extra and not methods and (chosen is None or len(chosen) > 1 or chosen == ["all"]):
        raise InputError("--option: expected one family: options belong to a family")
    from simulator.predict.caveats import uncalibrated
    from simulator.predict.table import table

    requested = run.requests(known, ideal=ideal)
    with render.progress("predicting") as report:
        found = table(
            [model],
            options.devices(hardware, same_stack),
            chosen,
            None if sparsity is None else options.fractions("--sparsity", sparsity),
            requested.phase,
            requested.batch,
            requested.seq,
            method=methods,
            pruned=[] if pruned is None else options.names("--pruned", pruned),
            engine=requested.engine,
            scenario=requested.scenario,
            options=extra,
            progress=report,
        )
    shown = [replace(r, family=r.pruned or r.method or r.family) for r in found]
    if output.write([r.to_dict() for r in found]):
        _print(shown, memory)
    if figure:
        from simulator.cli.drawing import draw_speedups

        draw_speedups(shown, figure)
    render.notes((*uncalibrated(found), *found.notes), verbose)


def _print(results: Sequence[Result], memory: bool) -> None:
    """Print one table per scenario, rows by family and sparsity, devices side by side."""
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.scenario, []).append(r)
    available = render.width()
    first = True
    for title, group in groups.items():
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
    print(
        f"\ntimes and speedups with {render.percent(results[0].level)} intervals; "
        "bounds exclude work that pruning adds;\nbottleneck: largest share of the pruned model's time"
    )


def _chunks(results: Sequence[Result], available: int) -> Iterator[list[Result]]:
    """Split results into tables of as many devices as fit in the narrowest layout with intervals, equally many each."""
    names = list(dict.fromkeys(r.hardware for r in results))
    for tables in range(1, len(names) + 1):
        count = -(-len(names) // tables)
        parts = [[r for r in results if r.hardware in names[i : i + count]] for i in range(0, len(names), count)]
        if count == 1 or all(render.table_width(list(speedup_layouts(part))[-2]) <= available for part in parts):
            yield from parts
            return


def speedup_layouts(results: Sequence[Result]) -> Iterator[list[render.Column]]:
    """Yield layouts of a speedup table from the most detailed to the narrowest; the first row is the dense model."""
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
                columns.append(
                    render.Column(f"{h}\ntime", ["", *(render.seconds(r.pruned_s) if r else "-" for r in found)])
                )
            shown = render.interval if interval else lambda r: render.ratio(r.speedup)
            whole = dense[h]
            ends = whole.dense_s, whole.dense_lower, whole.dense_upper
            dense_time = render.seconds_between(*ends) if interval else render.seconds(whole.dense_s)
            cells = [dense_time, *(shown(r) if r else "-" for r in found)]
            columns.append(render.Column(f"{h}\nspeedup", cells, styles=["", *(_style(r) for r in found)]))
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
    """Return the title of the column of row names."""
    return "model" if results[0].pruned else "method" if results[0].method else "family"


def _crossed(results: Sequence[Result]) -> tuple[list[str], list[tuple[str, float]], dict[Any, Result]]:
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
    """Print serving numbers: new tokens/s per device, latencies, the largest batch that fits."""
    waits = "; time to first token depends on how requests arrive" if results[0].phase == "serve" else ""
    for i, h in enumerate(dict.fromkeys(r.hardware for r in results)):
        mine = [r for r in results if r.hardware == h]
        first, rows = mine[0], [(r.tokens_per_s, r.ttft_s, r.tpot_s, r.pruned_largest_batch) for r in mine]
        rows = [(first.dense_tokens_per_s, first.dense_ttft_s, first.dense_tpot_s, first.dense_largest_batch), *rows]
        each = [(rate or 0.0) / first.devices for rate, *_ in rows]
        columns = [
            render.Column(_kind(mine), ["dense", *(r.family for r in mine)], right=False),
            render.Column("pruned", ["", *(render.percent(r.sparsity) for r in mine)]),
            render.Column("tokens/s\nper GPU", [f"{rate:,.0f}" for rate in each]),
            render.Column("time to\nfirst token", [render.seconds(ttft or 0.0) for _, ttft, _, _ in rows]),
            render.Column("time per\noutput token", [render.seconds(tpot or 0.0) for _, _, tpot, _ in rows]),
            render.Column("largest batch\nthat fits", [f"{largest:,}" for *_, largest in rows]),
        ]
        if i:
            print()
        render.show(columns, f"{h}: new tokens{waits}")


def _print_memory(results: Sequence[Result]) -> None:
    """Print the memory of the dense and the pruned models against each device's capacity."""
    hardware, rows, at = _crossed(results)
    any_of = [next(at[h, row] for h in hardware if (h, row) in at) for row in rows]
    first = results[0]
    needs = [render.size(first.dense_memory_bytes), *(render.size(r.pruned_memory_bytes) for r in any_of)]
    columns = [
        render.Column(_kind(results), ["dense", *(name for name, _ in rows)], right=False),
        render.Column("pruned", ["", *(render.percent(s) for _, s in rows)]),
        render.Column("memory", needs),
    ]
    words = {True: "fits", False: "too large", None: "-"}
    for h in hardware:
        whole = next(r for r in results if r.hardware == h)
        found = [at.get((h, row)) for row in rows]
        fits = [words[whole.dense_fits], *(words[r.pruned_fits if r else None] for r in found)]
        columns.append(render.Column(f"{h}\n{render.size(whole.capacity_bytes)}", fits, right=False))
    per_device = " of each device" if first.devices > 1 else ""
    render.show(render.narrowed(columns, 4), f"memory{per_device}: weights, cache, activations")
