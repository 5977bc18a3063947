"""``prunesim advise``: which pruning reaches a target speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render

if TYPE_CHECKING:
    from simulator.predict.advise import Advice, Alternative

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of a model, or its Hugging Face config.json (file or folder).")
]
Target = Annotated[float, typer.Option("--target", metavar="X", help="Speedup wanted, above 1.")]
Family = Annotated[str, typer.Option("--family", metavar="LIST", help="Pruning families to consider, or all.")]


def command(
    model: Model,
    hardware: options.Hardware,
    target: Target,
    family: Family = "all",
    phase: options.Phase = "prefill",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    new_tokens: options.NewTokens = 128,
    runtime: options.Runtime = "cuda_graph",
    dtype: options.Dtype = "bf16",
    weight_dtype: options.WeightDtype = None,
    kv_dtype: options.KvDtype = None,
    devices: options.Devices = 1,
    parallel: options.Parallel = "tensor",
    ideal: options.Ideal = False,
    json: options.Json = False,
) -> None:
    """Find the least pruning that reaches a target speedup.

    For each family the least sparsity, the aligned widths around it at which time steps down, and what else would reach the target.
    """
    from simulator.predict.advise import advise

    found = advise(
        model,
        options.names("--hardware", hardware),
        target,
        options.names("--phase", phase),
        options.integers("--batch", batch),
        options.integers("--seq", seq),
        options.names("--family", family),
        ideal=ideal,
        setting=options.setting(new_tokens, runtime, dtype, weight_dtype, kv_dtype, devices, parallel),
    )
    if json:
        print(render.json_lines([asdict(a) for a in found.advice]))
        return
    groups: dict[tuple[object, ...], list[Advice]] = {}
    for a in found.advice:
        groups.setdefault((a.hardware, a.phase, a.batch, a.seq), []).append(a)
    for i, (key, group) in enumerate(groups.items()):
        if i:
            print()
        _print(group, [o for o in found.alternatives if (o.hardware, o.phase, o.batch, o.seq) == key])
    for line in found.notes:
        render.note(line)
    uncalibrated = list(dict.fromkeys(a.hardware for a in found.advice if not a.calibrated))
    if uncalibrated:
        render.note(
            f"{', '.join(uncalibrated)}: not calibrated for everything this needs; the intervals are wide for it"
        )


def _print(group: Sequence[Advice], others: Sequence[Alternative]) -> None:
    """One device and request: families, steps of their widths, alternatives."""
    first = group[0]
    verdicts = [
        render.percent(a.sparsity)
        if a.reached
        else f"not reachable (at most {render.ratio(a.speedup)} at {render.percent(a.sparsity)})"
        for a in group
    ]
    quality = [
        ""
        if a.quality_loss is None
        else f"{a.quality_loss:g} % at {render.percent(a.quality_at or 0.0)} ({a.quality_source})"
        for a in group
    ]
    columns = [
        render.Column("family", [a.family for a in group], right=False),
        render.Column("least sparsity", verdicts, right=False),
        render.Column("realised", [render.percent(a.realised_sparsity) if a.reached else "" for a in group]),
        render.Column(
            "for sure", [render.percent(a.sure_sparsity) if a.sure_sparsity is not None else "-" for a in group]
        ),
        render.Column("speedup", [_interval(a) for a in group]),
        render.Column("time", [render.seconds(a.pruned_s) for a in group]),
        render.Column("limit", [a.limit for a in group], right=False),
    ]
    if any(quality):
        columns.insert(4, render.Column("quality lost", quality, right=False))
    while len(columns) > 4 and render.table_width(columns) > render.width():
        columns.pop()
    title = f"{first.model} on {first.hardware}, {first.phase}, batch {first.batch}, seq {first.seq}, {first.dtype}, {first.runtime}"
    render.show(columns, f"{title}: {render.ratio(first.target)}x from {render.seconds(first.dense_s)}")
    print("for sure: the least sparsity whose whole interval reaches the target")
    steps = [(a.family, step) for a in group for step in a.steps]
    if steps:
        print()
        render.show(
            [
                render.Column("family", [name for name, _ in steps], right=False),
                render.Column("width", [f"{s.name} {s.width}" for _, s in steps], right=False),
                render.Column("sparsity", [render.percent(s.sparsity) for _, s in steps]),
                render.Column("saves", [render.percent(s.saved) for _, s in steps]),
                render.Column("speedup", [render.ratio(s.speedup) for _, s in steps]),
                render.Column("target", ["reached" if s.reached else "missed" for _, s in steps], right=False),
            ],
            "aligned widths around them where time steps down (saves: against the next wider one)",
        )
    if others:
        print()
        render.show(
            [
                render.Column("else", [o.what for o in others], right=False),
                render.Column("speedup", [_interval(o) for o in others]),
                render.Column("target", ["reached" if o.reached else "missed" for o in others], right=False),
            ],
            "what else",
        )


def _interval(found: Advice | Alternative) -> str:
    return f"{render.ratio(found.speedup)} ({render.ratio(found.speedup_lower)}-{render.ratio(found.speedup_upper)})"
