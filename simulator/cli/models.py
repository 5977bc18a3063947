"""``prunesim models``: the models known by name, and the shapes of one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError

app = typer.Typer(help="Models: list those known by name, show the shapes of one.")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the models known by name."""
    from simulator.models.library import list_models, load_model

    models = [load_model(name) for name in list_models()]
    if json:
        print(render.json_lines([{**asdict(m), "parameters": m.parameters} for m in models]))
        return
    columns = render.columns(
        models,
        ("<name", lambda m: m.name),
        ("parameters", lambda m: f"{m.parameters:,}"),
        ("layers", lambda m: m.layers),
        ("hidden", lambda m: m.hidden),
        ("heads", lambda m: f"{m.heads}/{m.kv_heads}"),
        ("inner", lambda m: m.inner),
        ("vocabulary", lambda m: f"{m.vocab:,}"),
        ("<architecture", lambda m: m.architecture),
    )
    render.show(render.narrowed(columns, 2))


@app.command()
def show(
    name: Annotated[str, arg("NAME", "Name of a model, or its config.json (file or folder).")],
    batch: Annotated[int, opt("--batch", "N", "Sequences in a batch.")] = 1,
    seq: Annotated[int, opt("--seq", "N", "Prompt tokens of a sequence.")] = 2048,
    json: options.Json = False,
) -> None:
    """Show one model: shapes, parameters, GEMMs."""
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
    size = render.size(2.0 * model.parameters)
    print(f"{model.name} ({model.architecture}): {model.parameters:,} parameters, {size} in 16 bits")
    heads = f"{model.heads} heads on {model.kv_heads} KV heads of {model.head_dim}"
    sizes = f"{mlp} of {model.inner}, vocabulary {model.vocab:,}"
    print(f"{model.layers} layers, hidden {model.hidden}, {heads}, {sizes}\n")
    columns = render.columns(
        rows,
        ("<GEMM", lambda r: r["role"]),
        ("M", lambda r: r["m"]),
        ("N", lambda r: r["n"]),
        ("K", lambda r: r["k"]),
        ("times", lambda r: f"{r['count']:g}"),
        ("share of FLOPs", lambda r: render.percent(r["flops"] / total)),
    )
    render.show(columns, f"prefill, batch {batch}, seq {seq}: {total:.4g} FLOP")
