"""``prunesim models``: list the models known by name, show the shapes of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.models.config import ModelConfig

app = typer.Typer(help="Models: list those known by name, show the shapes of one.")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the models known by name."""
    from simulator.models.library import list_models, load_model

    models = [load_model(name) for name in list_models()]
    if json:
        render.show_json([m.to_dict() for m in models])
        return
    columns = render.columns(
        models,
        ("<name", lambda m: m.name),
        ("parameters", lambda m: f"{m.parameters:,}"),
        ("active", lambda m: f"{m.active_parameters / 1e9:.3g}e9" if m.experts else ""),
        ("layers", lambda m: m.layers),
        ("hidden", lambda m: m.hidden),
        ("heads", lambda m: f"{m.heads}/{m.kv_heads}"),
        ("inner", lambda m: m.inner or ""),
        ("experts", lambda m: f"{m.experts}/{m.active:g}" if m.experts else ""),
        ("vocabulary", lambda m: f"{m.vocab:,}"),
        ("<architecture", lambda m: m.architecture),
    )
    render.show(render.narrowed(columns, 2))


def _shapes(model: ModelConfig) -> str:
    """Return the shapes of the layers as text; of the most frequent kind if they differ."""
    kinds = len(set(model.layout))
    layers = f"{model.layers} layers" + (f" of {kinds} kinds" if kinds > 1 else "")
    heads = f"{model.heads} heads on {model.kv_heads} KV heads of {model.head_dim}"
    if model.latent is not None:
        heads = f"{model.heads} heads of {model.head_dim} on a latent of {model.latent.rank} + {model.latent.rotary}"
    nets = [block for block in model.layout if block.delta]
    if nets and model.delta is not None:
        own = f"{nets[0].heads} value heads of {model.delta.value} on {nets[0].kv_heads} key heads of {model.delta.key}"
        heads = f"{len(nets)} with a gated delta net of {own}, the others with {heads}"
    mlps = [f"{'gated' if model.gated else 'plain'} MLP of {model.inner}"] if model.inner else []
    if model.experts:
        mlps.append(f"{model.experts} experts of {model.expert_inner}, {model.active:g} per token")
    mostly = "mostly " if kinds > 1 and not nets else ""
    return f"{layers}, hidden {model.hidden}, {mostly}{heads}, {' and '.join(mlps)}, vocabulary {model.vocab:,}"


@app.command()
def show(
    name: Annotated[str, arg("NAME", "Name of a model, or its config.json (file or folder).", "MODEL")],
    batch: Annotated[int, opt("--batch", "N", "Sequences in a batch.")] = 1,
    seq: Annotated[int, opt("--seq", "N", "Prompt tokens of a sequence.")] = 2048,
    json: options.Json = False,
) -> None:
    """Show one model: shapes, parameters, GEMMs."""
    from simulator.codes import ROLES, Kind
    from simulator.models.library import load_model
    from simulator.models.lower import lower

    if min(batch, seq) < 1:
        raise InputError(f"batch {batch}, seq {seq}: expected whole numbers from 1 up")
    model = load_model(name)
    workload = lower(model, phase="prefill", batch=batch, seq=seq)
    gemms = workload.take((workload.kind == Kind.GEMM) | (workload.kind == Kind.EXPERTS))
    total = float(workload.flops.sum())
    rows: dict[tuple[str | int, ...], dict[str, Any]] = {}  # different layers may share shapes
    for i in range(len(gemms)):
        shape = {"role": ROLES[gemms.role[i]], **{key: int(getattr(gemms, key)[i]) for key in ("m", "n", "k")}}
        row = rows.setdefault(tuple(shape.values()), {**shape, "count": 0.0, "flops": 0.0})
        row |= {key: row[key] + float(getattr(gemms, key)[i]) for key in ("count", "flops")}
    if json:
        render.show_json([{**model.to_dict(), "flops": total, "gemms": list(rows.values())}])
        return
    active = f", {model.active_parameters:,} of them active" if model.experts else ""
    size = render.size(2.0 * model.parameters)
    print(f"{model.name} ({model.architecture}): {model.parameters:,} parameters{active}, {size} in 16 bits")
    print(f"{_shapes(model)}\n")
    columns = render.columns(
        list(rows.values()),
        ("<GEMM", lambda r: r["role"]),
        ("M", lambda r: r["m"]),
        ("N", lambda r: r["n"]),
        ("K", lambda r: r["k"]),
        ("times", lambda r: f"{r['count']:g}"),
        ("share of FLOPs", lambda r: render.percent(r["flops"] / total)),
    )
    render.show(columns, f"prefill, batch {batch}, seq {seq}: {total:.4g} FLOP")
    if model.found:
        render.notes([model.found])
