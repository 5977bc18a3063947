"""``prunesim advise``: which pruning reaches a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.predict.words import uncalibrated

if TYPE_CHECKING:
    from simulator.predict.advise import Advice, Alternative
    from simulator.predict.configurations import Configuration


@options.expanded()
def command(
    model: options.Model,
    hardware: options.Hardware,
    target: Annotated[float | None, opt("--target", "X", "Speedup wanted, above 1.")] = None,
    latency: Annotated[str | None, opt("--latency", "TIME", "Or the time wanted of a pass, such as 12ms.")] = None,
    tokens_per_s: Annotated[
        float | None, opt("--tokens-per-s", "X", "Or new tokens a second of all sequences.")
    ] = None,
    family: Annotated[str, opt("--family", "LIST", "Pruning families to consider, or all.")] = "all",
    probability: Annotated[float, opt("--odds", "P", "Odds with which a configuration must reach it.")] = 0.5,
    write: Annotated[
        str | None, opt("--write", "FOLDER", "Write FOLDER/CONFIGURATION/config.json for each configuration.")
    ] = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    json: options.Json = False,
) -> None:
    """Find the least pruning that reaches a target.

    First configurations: layers, hidden size, heads, KV heads and MLP inner width that reach it on every device, engine
    and request at once with the fewest parameters removed. Then, for each of these, the least sparsity of each family,
    and what else would reach the target.
    """
    from simulator.predict.advise import advise
    from simulator.predict.configurations import Target

    devices, asked = options.names("--hardware", hardware), known.added(run.asked())
    if sum(given is not None for given in (target, latency, tokens_per_s)) != 1:
        raise InputError("--target, --latency, --tokens-per-s: expected one of them")
    aim = Target(target, None if latency is None else options.duration("--latency", latency), tokens_per_s)
    with render.progress("searching") as report:
        found = advise(
            model,
            devices,
            aim,
            family=options.names("--family", family),
            ideal=ideal,
            probability=probability,
            progress=report,
            **asked,
        )
    written = _written(write, model, found.configurations) if write else ()
    if not render.Output(json).write(found.rows()):
        return
    if found.configurations:
        _configurations(found.configurations)
    groups: dict[tuple[object, ...], list[Advice]] = {}
    for a in found.advice:
        groups.setdefault((a.hardware, a.phase, a.batch, a.seq, a.engine), []).append(a)
    for i, (key, group) in enumerate(groups.items()):
        if i or found.configurations:
            print()
        others = [o for o in found.alternatives if (o.hardware, o.phase, o.batch, o.seq, o.engine) == key]
        _print(group, others, bool(found.configurations))
    for line in (*written, *found.notes, *uncalibrated((*found.advice, *found.configurations))):
        render.note(line)


def _written(folder: str, model: str, found: Sequence[Configuration]) -> tuple[str, ...]:
    """A config.json of each configuration in a folder of its name; says where."""
    from simulator.models.changes import content_of, write_config

    content = content_of(model)
    if not content:
        raise InputError(f"--write: {model} has no config.json to start from; expected a name or a file")
    changed = {c.configuration: c.config for c in found}
    for name, config in changed.items():
        write_config(Path(folder) / name, {**content, **config})
    return (f"written: {folder}/{{{','.join(changed)}}}/config.json",) if changed else ()


def _configurations(found: Sequence[Configuration]) -> None:
    """Shapes, and what they reach: beside them at one place, below them at several."""
    from simulator.predict.settings import batch_name

    first, places = found[0], dict.fromkeys((c.hardware, c.engine, c.phase, c.batch, c.seq) for c in found)
    shapes = list({c.configuration: c for c in found}.values())
    reached = [
        ("speedup", render.interval),
        ("probability", lambda c: "> 99 %" if c.probability > 0.99 else f"{100.0 * c.probability:.0f} %"),
        ("time", lambda c: render.seconds(c.pruned_s)),
        ("<limit", lambda c: c.bottleneck),
    ]
    columns = render.columns(
        shapes,
        ("<what changes", lambda c: c.configuration),
        ("layers", lambda c: c.layers),
        ("hidden", lambda c: c.hidden),
        ("heads", lambda c: c.heads),
        ("KV", lambda c: c.kv_heads),
        ("inner", lambda c: c.inner),
        ("kept", lambda c: render.percent(c.kept)),
        *(reached if len(places) == 1 else ()),
        ("parameters", lambda c: f"{c.parameters:,}"),
    )
    where = f"{first.hardware}, {first.engine}, {first.phase}, {batch_name(first.phase)} {first.batch}, seq {first.seq}"
    title = f"configurations of {first.model}, by parameters kept, that reach the target"
    several = f"{title} on all {len(places)} devices, engines and requests"
    render.show(render.narrowed(columns, 8), f"{title}: {where}" if len(places) == 1 else several)
    if len(places) > 1:
        print()
        requests = len({place[2:] for place in places}) > 1
        columns = render.columns(
            found,
            ("<what changes", lambda c: c.configuration),
            ("<hardware", lambda c: c.hardware),
            ("<engine", lambda c: c.engine),
            *([("<request", lambda c: f"{c.phase} {c.batch} x {c.seq}")] if requests else []),
            *reached,
        )
        render.show(render.narrowed(columns, 5 + requests), "what they reach there")
    print("odds: that the target is reached, by the interval of the speedup")


def _print(group: Sequence[Advice], others: Sequence[Alternative], aligned: bool) -> None:
    """One device, request and engine: families, steps of their widths unless configurations say which are, and
    alternatives."""
    first = group[0]
    columns = render.columns(
        group,
        ("<family", lambda a: a.family),
        ("<least sparsity", _verdict),
        ("realised", lambda a: render.percent(a.realised_sparsity) if a.reached else ""),
        ("for sure", lambda a: "-" if a.sure_sparsity is None else render.percent(a.sure_sparsity)),
        ("<quality lost", _quality),
        ("speedup", render.interval),
        ("time", lambda a: render.seconds(a.pruned_s)),
        ("<limit", lambda a: a.bottleneck),
    )
    columns = [c for c in columns if c.title != "quality lost" or any(c.cells)]
    title = f"{first.model} on {first.hardware}, {first.phase}, batch {first.batch}, seq {first.seq}, {first.dtype}"
    aim = f"{render.ratio(first.target)}x from {render.seconds(first.dense_s)}"
    render.show(render.narrowed(columns, 4), f"{title}, {first.engine}: {aim}")
    print("for sure: the least sparsity whose whole interval reaches the target")
    if not aligned and (steps := [(a.family, step) for a in group for step in a.steps]):
        print()
        render.show(
            render.columns(
                steps,
                ("<family", lambda s: s[0]),
                ("<width", lambda s: f"{s[1].name} {s[1].width}"),
                ("sparsity", lambda s: render.percent(s[1].sparsity)),
                ("saves", lambda s: render.percent(s[1].saved)),
                ("speedup", lambda s: render.ratio(s[1].speedup)),
                ("<target", lambda s: _reached(s[1].reached)),
            ),
            "aligned widths around them where time steps down (saves: against the next wider one)",
        )
    if others:
        print()
        render.show(
            render.columns(
                others,
                ("<else", lambda o: o.what),
                ("speedup", render.interval),
                ("<target", lambda o: _reached(o.reached)),
            ),
            "what else",
        )


def _verdict(a: Advice) -> str:
    if a.reached:
        return render.percent(a.sparsity)
    return f"not reachable (at most {render.ratio(a.speedup)} at {render.percent(a.sparsity)})"


def _quality(a: Advice) -> str:
    if a.quality_loss is None:
        return ""
    return f"{a.quality_loss:g} % at {render.percent(a.quality_at or 0.0)} ({a.quality_source})"


def _reached(yes: bool) -> str:
    return "reached" if yes else "missed"
