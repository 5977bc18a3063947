"""``prunesim advise``: find prunings that reach a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.predict.advise import Advice, Alternative
    from simulator.predict.configurations import Configuration


@options.expanded()
def command(
    model: options.Model,
    hardware: options.Hardware,
    target: Annotated[float | None, opt("--target", "X", "Target speedup, above 1.")] = None,
    latency: Annotated[str | None, opt("--latency", "TIME", "Or the target time of a pass, such as 12ms.")] = None,
    tokens_per_s: Annotated[
        float | None, opt("--tokens-per-s", "X", "Or the target of new tokens/s over all sequences.")
    ] = None,
    family: Annotated[str, opt("--family", "LIST", "Pruning families to consider, or all.")] = "all",
    confidence: Annotated[
        float, opt("--confidence", "P", "Minimum probability of reaching the target (configurations).")
    ] = 0.5,
    write: Annotated[
        str | None, opt("--write", "FOLDER", "Write FOLDER/CONFIGURATION/config.json for each configuration.")
    ] = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    json: options.Json = False,
) -> None:
    """Find the minimum pruning that reaches a target.

    Prints configurations (layers, hidden size, heads, KV heads and MLP inner width) that reach the target on every
    device, engine and request with the fewest parameters removed. Then, for each device, engine and request: the
    minimum sparsity of each family, and alternatives.
    """
    from simulator.predict.advise import advise
    from simulator.predict.caveats import uncalibrated
    from simulator.predict.configurations import Target

    requested = run.requests(known, ideal=ideal)
    if sum(given is not None for given in (target, latency, tokens_per_s)) != 1:
        raise InputError("--target, --latency, --tokens-per-s: expected one of them")
    aim = Target(target, None if latency is None else options.duration("--latency", latency), tokens_per_s)
    with render.progress("searching") as report:
        found = advise(
            model,
            options.names("--hardware", hardware),
            aim,
            requested.phase,
            requested.batch,
            requested.seq,
            options.names("--family", family),
            engine=requested.engine,
            scenario=requested.scenario,
            probability=confidence,
            progress=report,
        )
    written = _written(write, model, found.configurations) if write else ()
    if not render.Output(json).write(found.rows()):
        return
    if found.configurations:
        _configurations(found.configurations)
    groups: dict[str, list[Advice]] = {}
    for a in found.advice:
        groups.setdefault(a.result.request, []).append(a)
    for i, (request, group) in enumerate(groups.items()):
        if i or found.configurations:
            print()
        others = [o for o in found.alternatives if o.result.request == request]
        _print(group, others, bool(found.configurations))
    results = [held.result for held in (*found.advice, *found.configurations)]
    for line in (*written, *found.notes, *uncalibrated((r.hardware for r in results), (r.calibrated for r in results))):
        render.note(line)


def _written(folder: str, model: str, found: Sequence[Configuration]) -> tuple[str, ...]:
    """Write the config.json of each configuration to a folder of its name; return a note on the files."""
    from simulator.models.changes import content_of, write_config

    content = content_of(model)
    if not content:
        raise InputError(f"--write: {model} has no config.json to start from; expected a name or a file")
    changed = {c.configuration: c.config for c in found}
    for name, config in changed.items():
        write_config(Path(folder) / name, {**content, **config})
    return (f"written: {folder}/{{{','.join(changed)}}}/config.json",) if changed else ()


def _configurations(found: Sequence[Configuration]) -> None:
    """Print shapes and results: in one table for one device and request, else in two."""
    first, requests = found[0].result, dict.fromkeys(c.result.request for c in found)
    shapes = list({c.configuration: c for c in found}.values())
    reached = [
        ("speedup", lambda c: render.interval(c.result)),
        ("probability", lambda c: "> 99 %" if c.probability > 0.99 else f"{100.0 * c.probability:.0f} %"),
        ("time", lambda c: render.seconds(c.result.pruned_s)),
        ("<bottleneck", lambda c: c.result.bottleneck),
    ]
    columns = render.columns(
        shapes,
        ("<changed", lambda c: c.configuration),
        ("layers", lambda c: c.layers),
        ("hidden", lambda c: c.hidden),
        ("heads", lambda c: c.heads),
        ("KV", lambda c: c.kv_heads),
        ("inner", lambda c: c.inner),
        ("kept", lambda c: render.percent(c.kept)),
        *(reached if len(requests) == 1 else ()),
        ("parameters", lambda c: f"{c.parameters:,}"),
    )
    title = f"configurations of {first.model}, by parameters kept, that reach the target"
    several = f"{title} on all {len(requests)} devices, engines and requests"
    render.show(render.narrowed(columns, 8), f"{title}: {first.request}" if len(requests) == 1 else several)
    if len(requests) > 1:
        print()
        differ = len({(c.result.phase, c.result.batch, c.result.seq) for c in found}) > 1
        columns = render.columns(
            found,
            ("<changed", lambda c: c.configuration),
            ("<hardware", lambda c: c.result.hardware),
            ("<engine", lambda c: c.result.engine),
            *([("<request", lambda c: f"{c.result.phase} {c.result.batch} x {c.result.seq}")] if differ else []),
            *reached,
        )
        render.show(render.narrowed(columns, 5 + differ), "their results")
    print("probability: of reaching the target, from the speedup interval")


def _print(group: Sequence[Advice], others: Sequence[Alternative], aligned: bool) -> None:
    """Print families, steps of their widths (unless configurations show aligned widths) and alternatives, for one
    device, request and engine."""
    first = group[0].result
    columns = render.columns(
        group,
        ("<family", lambda a: a.result.family),
        ("<minimum sparsity", _verdict),
        ("realised", lambda a: render.percent(a.result.realised_sparsity) if a.reached else ""),
        ("with the\nwhole interval", lambda a: "-" if a.sure_sparsity is None else render.percent(a.sure_sparsity)),
        ("speedup", lambda a: render.interval(a.result)),
        ("time", lambda a: render.seconds(a.result.pruned_s)),
        ("<bottleneck", lambda a: a.result.bottleneck),
    )
    aim = f"{render.ratio(group[0].target)}x from {render.seconds(first.dense_s)}"
    render.show(render.narrowed(columns, 4), f"{first.model} on {first.request}, {first.dtype}: {aim}")
    if not aligned and (steps := [(a.result.family, step) for a in group for step in a.steps]):
        print()
        render.show(
            render.columns(
                steps,
                ("<family", lambda s: s[0]),
                ("<width", lambda s: f"{s[1].name} {s[1].width}"),
                ("removed", lambda s: render.percent(s[1].fraction)),
                ("saves", lambda s: render.percent(s[1].saved)),
                ("speedup", lambda s: render.ratio(s[1].result.speedup)),
                ("<target", lambda s: _reached(s[1].reached)),
            ),
            "aligned widths nearby where time steps down (saves: against the next wider width)",
        )
    if others:
        print()
        render.show(
            render.columns(
                others,
                ("<alternative", lambda o: o.what),
                ("speedup", lambda o: render.interval(o.result)),
                ("<target", lambda o: _reached(o.reached)),
            ),
            "alternatives",
        )


def _verdict(a: Advice) -> str:
    if a.reached:
        return render.percent(a.result.sparsity)
    return f"not reachable (at most {render.ratio(a.result.speedup)} at {render.percent(a.result.sparsity)})"


def _reached(yes: bool) -> str:
    return "reached" if yes else "missed"
