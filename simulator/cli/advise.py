"""``prunesim advise``: which pruning reaches a target speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.predict.words import uncalibrated

if TYPE_CHECKING:
    from simulator.predict.advise import Advice, Alternative


@options.expanded()
def command(
    model: options.Model,
    hardware: options.Hardware,
    target: Annotated[float, opt("--target", "X", "Speedup wanted, above 1.")],
    family: Annotated[str, opt("--family", "LIST", "Pruning families to consider, or all.")] = "all",
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    json: options.Json = False,
) -> None:
    """Find the least pruning that reaches a target speedup.

    For each family the least sparsity, the aligned widths around it at which time steps down, and what else would reach
    the target.
    """
    from simulator.predict.advise import advise

    devices, asked = options.names("--hardware", hardware), known.added(run.asked())
    found = advise(model, devices, target, family=options.names("--family", family), ideal=ideal, **asked)
    if not render.Output(json).write([asdict(a) for a in found.advice]):
        return
    groups: dict[tuple[object, ...], list[Advice]] = {}
    for a in found.advice:
        groups.setdefault((a.hardware, a.phase, a.batch, a.seq), []).append(a)
    for i, (key, group) in enumerate(groups.items()):
        if i:
            print()
        _print(group, [o for o in found.alternatives if (o.hardware, o.phase, o.batch, o.seq) == key])
    for line in (*found.notes, *uncalibrated(found.advice)):
        render.note(line)


def _print(group: Sequence[Advice], others: Sequence[Alternative]) -> None:
    """One device and request: families, steps of their widths, alternatives."""
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
        ("<limit", lambda a: a.limit),
    )
    columns = [c for c in columns if c.title != "quality lost" or any(c.cells)]
    title = f"{first.model} on {first.hardware}, {first.phase}, batch {first.batch}, seq {first.seq}, {first.dtype}"
    aim = f"{render.ratio(first.target)}x from {render.seconds(first.dense_s)}"
    render.show(render.narrowed(columns, 4), f"{title}, {first.engine}: {aim}")
    print("for sure: the least sparsity whose whole interval reaches the target")
    if steps := [(a.family, step) for a in group for step in a.steps]:
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
