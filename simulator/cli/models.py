"""``prunesim models``: the models known by name, and the shapes of one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from simulator.cli import options, render

app = typer.Typer(help="Models: list those known by name, show the shapes of one.")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the models known by name."""
    from simulator.models.library import list_models, load_model

    models = [load_model(name) for name in list_models()]
    if json:
        print(render.json_lines([{**asdict(m), "parameters": m.parameters} for m in models]))
        return
    columns = [
        render.Column("name", [m.name for m in models], right=False),
        render.Column("parameters", [f"{m.parameters:,}" for m in models]),
        render.Column("layers", [str(m.layers) for m in models]),
        render.Column("hidden", [str(m.hidden) for m in models]),
        render.Column("heads", [f"{m.heads}/{m.kv_heads}" for m in models]),
        render.Column("inner", [str(m.inner) for m in models]),
        render.Column("vocabulary", [f"{m.vocab:,}" for m in models]),
        render.Column("architecture", [m.architecture for m in models], right=False),
    ]
    while len(columns) > 2 and render.table_width(columns) > render.width():
        columns.pop()
    render.show(columns)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model, or its config.json (file or folder).")],
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences in a batch.")] = 1,
    seq: Annotated[int, typer.Option("--seq", metavar="N", help="Prompt tokens of a sequence.")] = 2048,
    json: options.Json = False,
) -> None:
    """Show one model: shapes, parameters, GEMMs."""
    from simulator.errors import InputError
    from simulator.models.library import load_model
    from simulator.models.lower import lower
    from simulator.workload import ROLES, Kind

    if min(batch, seq) < 1:
        raise InputError(f"batch {batch}, seq {seq}: expected whole numbers from 1 up")
    model = load_model(name)
    workload = lower(model, phase="prefill", batch=batch, seq=seq)
    gemms = workload.take(workload.kind == Kind.GEMM)
    total = float(workload.flops.sum())
    rows = [
        {
            "role": ROLES[gemms.role[i]],
            **{key: int(getattr(gemms, key)[i]) for key in ("m", "n", "k")},
            **{key: float(getattr(gemms, key)[i]) for key in ("count", "flops")},
        }
        for i in range(len(gemms))
    ]
    if json:
        print(render.json_lines([{**asdict(model), "parameters": model.parameters, "flops": total, "gemms": rows}]))
        return
    mlp = "gated MLP" if model.gated else "plain MLP"
    print(
        f"{model.name} ({model.architecture}): {model.parameters:,} parameters, {render.size(2.0 * model.parameters)} in 16 bits"
    )
    print(
        f"{model.layers} layers, hidden {model.hidden}, {model.heads} heads on {model.kv_heads} KV heads of {model.head_dim}, "
        f"{mlp} of {model.inner}, vocabulary {model.vocab:,}\n"
    )
    render.show(
        [
            render.Column("GEMM", [r["role"] for r in rows], right=False),
            *(render.Column(key.upper(), [str(r[key]) for r in rows]) for key in ("m", "n", "k")),
            render.Column("times", [f"{r['count']:g}" for r in rows]),
            render.Column("share of FLOPs", [render.percent(r["flops"] / total) for r in rows]),
        ],
        f"prefill, batch {batch}, seq {seq}: {total:.4g} FLOP",
    )
