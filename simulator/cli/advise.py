"""``prunesim advise``: find prunings that reach a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError, one_line

if TYPE_CHECKING:
    from simulator.prediction.advise import Advice, Advised, Alternative
    from simulator.prediction.configurations import Configuration
    from simulator.prediction.reach import Reach
    from simulator.prediction.result import HasResult

MOST_SHAPES, MOST_ROWS = 3, 5
"""Configurations, and rows with families, of the table of one setting without --verbose."""

MOST_SETTINGS = 10
"""Rows of given prunings on several settings without --verbose; of more the best of each setting is shown."""


@options.expanded()
def command(
    model: options.Model,
    hardware: options.Hardware,
    target: Annotated[str | None, opt("--target", "X", "Target speedup, above 1, such as 1.5 or 1.5x.")] = None,
    latency: Annotated[str | None, opt("--latency", "TIME", "Or the target time of a pass, such as 12ms.")] = None,
    tokens_per_s: Annotated[
        float | None, opt("--tokens-per-s", "X", "Or the target of new tokens/s over all sequences.")
    ] = None,
    family: Annotated[str | None, opt("--family", "LIST", "Pruning families to consider. Default: all.")] = None,
    prune: Annotated[
        list[str] | None,
        opt("--prune", "TEXT", "Instead of a search: does this pruning (or plan.yaml) reach it? May be repeated."),
    ] = None,
    confidence: Annotated[
        float, opt("--confidence", "P", "Minimum probability of reaching the target (configurations, --prune).")
    ] = 0.5,
    write: Annotated[
        str | None, opt("--write", "FOLDER", "Write FOLDER/CONFIGURATION/config.json for each configuration.")
    ] = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Find the minimum pruning that reaches a target.

    Begins with the least pruning that reaches the target and its probability, or how close the best comes. One device,
    engine and request has a table of the first configurations and families, several have one row each. With --prune
    nothing is searched: the answer is whether each text reaches the target, or by how much it misses. --verbose prints
    all configurations (layers, hidden size, heads, KV heads and MLP inner width) that reach the target on every device,
    engine and request, then for each of these the minimum sparsity of each family, and alternatives.
    """
    from simulator.prediction.advise import advise
    from simulator.prediction.caveats import uncalibrated
    from simulator.prediction.conclusions import of_advice
    from simulator.prediction.configurations import Target

    requested = run.requests(known, model=model, ideal=ideal)
    if sum(given is not None for given in (target, latency, tokens_per_s)) != 1:
        raise InputError("--target, --latency, --tokens-per-s: expected one of them")
    if write and prune:
        raise InputError("--write: expected no --prune, as it writes the configurations of a search")
    speedup = None if target is None else parsing.speedup_target("--target", target)
    aim = Target(speedup, None if latency is None else parsing.duration("--latency", latency), tokens_per_s)
    with render.progress("searching") as report:
        found = advise(
            model,
            parsing.names("--hardware", hardware),
            aim,
            requested.phase,
            requested.batch,
            requested.seq,
            None if family is None else parsing.names("--family", family),
            prune=prune or (),
            engine=requested.engine,
            scenario=requested.scenario,
            probability=confidence,
            progress=report,
        )
    written = _written(write, model, found.configurations) if write else ()
    if not render.Output(json).write(found.rows()):
        return
    render.conclude(" ".join(filter(None, of_advice(found, aim))))
    if found.given:
        _given(found.given, verbose)
    else:
        _details(found) if verbose else _summary(found)
    shown: list[HasResult] = [*found.configurations, *(a for a in found.advice if verbose or a.reached), *found.given]
    results = [held.result for held in shown]
    render.notes((*requested.notes, *written, *uncalibrated(results), *found.notes), verbose)


def _summary(found: Advised) -> None:
    """Print the least pruning of each setting, or of one setting the first configurations and families."""
    from simulator.prediction.conclusions import probability_text, settings_of, shapes_on
    from simulator.prediction.configurations import FAMILIES

    groups = settings_of(found.advice)
    if len(groups) != 1:
        _settings(groups)
        return
    ((where, group),) = groups.items()
    shapes = shapes_on(found, where)[:MOST_SHAPES]
    covered = set(FAMILIES.values()) if shapes else set()
    families = [a for a in group if a.reached and a.result.family not in covered] or group[: 0 if shapes else 1]
    held: list[Configuration | Advice] = [*shapes, *families[: MOST_ROWS - len(shapes)]]
    names = [f"{c.configuration}: {c.shapes}" for c in shapes]
    names += [f"{a.result.family} at {render.percent(a.result.sparsity)}" for a in families]
    columns = [
        render.Column("pruning", names[: len(held)], right=False),
        *render.columns(
            held,
            ("speedup", lambda row: render.interval(row.result)),
            ("probability", lambda row: probability_text(row.probability)),
            ("time", lambda row: render.seconds(row.result.pruned_s)),
            ("<bottleneck", lambda row: row.result.bottleneck),
        ),
    ]
    columns.append(
        render.Column("parameters kept", [render.percent(c.kept) for c in shapes] + ["-"] * (len(held) - len(shapes)))
    )
    render.show(render.narrowed(columns, 4))


def _settings(groups: Mapping[str, Sequence[Advice]]) -> None:
    """Print the best family of each setting, one per row."""
    from simulator.prediction.conclusions import probability_text

    best = [group[0] for group in groups.values()]
    if not best:
        return
    columns = render.columns(
        best,
        ("<hardware", lambda a: a.result.hardware),
        ("<engine", lambda a: a.result.engine),
        ("<request", lambda a: f"{a.result.phase} {a.result.batch} x {a.result.seq}"),
        ("<least pruning", lambda a: f"{a.result.family} at {render.percent(a.result.sparsity)}"),
        ("<target", lambda a: _reached(a.reached)),
        ("speedup", lambda a: render.interval(a.result)),
        ("probability", lambda a: probability_text(a.probability)),
        ("time", lambda a: render.seconds(a.result.pruned_s)),
        ("<bottleneck", lambda a: a.result.bottleneck),
    )
    render.show(render.narrowed(columns, 6))


def _given(given: Sequence[Reach], verbose: bool) -> None:
    """Print what given prunings reach, one per row; of many only the best of each setting, without --verbose."""
    from simulator.prediction.conclusions import probability_text, settings_of

    groups = settings_of(given)
    one = len(groups) == 1
    shown = (
        given[:MOST_ROWS] if one else given if len(given) <= MOST_SETTINGS else [some[0] for some in groups.values()]
    )
    place = [
        ("<hardware", lambda g: g.result.hardware),
        ("<engine", lambda g: g.result.engine),
        ("<request", lambda g: f"{g.result.phase} {g.result.batch} x {g.result.seq}"),
    ]
    columns = render.columns(
        given if verbose else shown,
        *([] if one else place),
        ("<pruning", lambda g: one_line(g.result.pruning, 40 if one else 28)),
        ("<target", lambda g: g.verdict),
        ("speedup", lambda g: render.interval(g.result)),
        ("probability", lambda g: probability_text(g.probability)),
        ("time", lambda g: render.seconds(g.result.pruned_s)),
        ("<bottleneck", lambda g: g.result.bottleneck),
    )
    hidden = 0 if verbose else len(given) - len(shown)
    title = (
        f"the best {f'{len(shown)} prunings' if one else 'pruning of each setting'}; {hidden} more rows with --verbose"
    )
    render.show(render.narrowed(columns, 4 if one else 6), title if hidden else "")


def _details(found: Advised) -> None:
    """Print all configurations, families, steps and alternatives."""
    from simulator.prediction.conclusions import settings_of
    from simulator.prediction.scenario import setting

    if found.configurations:
        _configurations(found.configurations)
    for i, (where, group) in enumerate(settings_of(found.advice).items()):
        if i or found.configurations:
            print()
        others = [o for o in found.alternatives if setting(o.result) == where]
        _print(group, others, bool(found.configurations))


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
    from simulator.prediction.conclusions import probability_text

    first, requests = found[0].result, dict.fromkeys(c.result.request for c in found)
    shapes = list({c.configuration: c for c in found}.values())
    reached = [
        ("speedup", lambda c: render.interval(c.result)),
        ("probability", lambda c: probability_text(c.probability)),
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
