"""``prunesim report``: write the page of a selection as one HTML file."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError
from simulator.units import parse_quantity

if TYPE_CHECKING:
    from simulator.explore.state import State


# fmt: off
Model = Annotated[str, arg("MODEL", "Name of a model, its config.json, or the address of a page of prunesim explore.")]
Output = Annotated[str, opt("-o --output", "FILE", "HTML file to write.")]
Hardware = Annotated[str | None, opt("--hardware", "LIST", "Devices: names, aliases or YAML files.")]
Family = Annotated[str | None, opt("--family", "LIST", "Pruning families, or all.")]
Sparsity = Annotated[str | None, opt("--sparsity", "LIST", "Fractions removed: the points of the curves.")]
Phase = Annotated[str | None, opt("--phase", "NAME", "prefill, decode, generate or serve.")]
Batch = Annotated[int | None, opt("--batch", "N", "Sequences in a batch.")]
Seq = Annotated[int | None, opt("--seq", "N", "Prompt tokens or cached positions of a sequence.")]
NewTokens = Annotated[int | None, opt("--new-tokens", "N", "Tokens that generate and serve decode.")]
Concurrency = Annotated[
    int | None, opt("--concurrency", "N", "Requests in flight for --phase serve (replaces --batch).")
]
Engine = Annotated[str | None, opt("--engine", "NAME", "Engine (see prunesim engines list) or YAML file.")]
Versus = Annotated[str | None, opt("--versus", "NAME", "Second engine; its waterfall is drawn next to the first.")]
Dense = Annotated[str | None, opt("--dense-time", "TIME", "Measured time of the dense model on one GPU: 18.6ms.")]
Dtype = Annotated[str | None, opt("--dtype", "NAME", "Number format.")]
WeightDtype = Annotated[str | None, opt("--weight-dtype", "NAME", "Format of stored weights.")]
Devices = Annotated[int | None, opt("--devices", "N", "Number of devices that share the model.")]
Pruned = Annotated[str | None, opt("--pruned", "PATH", "An existing pruned model: a checkpoint or config.json.")]
Detail = Annotated[
    str | None, opt("--detail", "NAME", "Family or text of --prune of waterfall, roofline and bounds, or pruned.")
]
Over = Annotated[str | None, opt("--over", "NAME", "Axis of the second figure of speedups: batch or seq.")]
Ttft = Annotated[str | None, opt("--ttft", "TIME", "Limit of the time to the first token of a serve.")]
Tpot = Annotated[str | None, opt("--tpot", "TIME", "Limit of the time per output token of a serve.")]
Price = Annotated[float | None, opt("--price", "X", "Price of a GPU-hour of a serve.")]
At = Annotated[float | None, opt("--at", "FRACTION", "Sparsity of waterfall, roofline and map.")]
# fmt: on


def command(
    model: Model,
    output: Output,
    hardware: Hardware = None,
    family: Family = None,
    sparsity: Sparsity = None,
    phase: Phase = None,
    batch: Batch = None,
    concurrency: Concurrency = None,
    seq: Seq = None,
    new_tokens: NewTokens = None,
    engine: Engine = None,
    versus: Versus = None,
    dense_time: Dense = None,
    dense_from: options.DenseFrom = None,
    dtype: Dtype = None,
    weight_dtype: WeightDtype = None,
    devices: Devices = None,
    pruned: Pruned = None,
    prune: options.Prune = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    price: Price = None,
    over: Over = None,
    detail: Detail = None,
    at: At = None,
    as_json: options.Json = False,
) -> None:
    """Write a selection as one HTML file.

    The file has the figures of prunesim explore, the table, the notes and the commands. It opens from disk and fetches
    nothing. Defaults of options are the page's initial state. Needs the extra "explore".
    """
    from simulator.files.write import check_target

    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: expected a name that ends in .html")
    check_target(output)
    from simulator.explore.report import write_report
    from simulator.hardware.library import reference
    from simulator.prediction.scenario import once

    given: dict[str, Any] = {"phase": phase, "batch": batch, "seq": seq, "new_tokens": new_tokens}
    given |= {"dtype": dtype, "weights": weight_dtype, "devices": devices, "pruned": pruned, "detail": detail, "at": at}
    given |= {"prune": tuple(prune) if prune else None, "over": over, "price": price}
    if concurrency is not None:
        if batch is not None or phase != "serve":
            raise InputError("--concurrency: expected with --phase serve, instead of --batch")
        given["batch"] = concurrency
    given |= {name: _engine(given_name) for name, given_name in (("engine", engine), ("versus", versus)) if given_name}
    for name, time in (("dense_ms", dense_time), ("ttft_ms", ttft), ("tpot_ms", tpot)):
        if time is not None:
            given[name] = float(Decimal(repr(parse_quantity(time, "s"))).scaleb(3))  # 18.6 stays 18.6
    if hardware is not None:
        given["gpus"] = once(reference(name) for name in parsing.names("--hardware", hardware))
    if family is not None:
        from simulator.prediction.prunings import families

        given["families"] = families(parsing.names("--family", family))
    if sparsity is not None:
        given["sparsities"] = once(parsing.fractions("--sparsity", sparsity))
    state = replace(_start(model), **{name: value for name, value in given.items() if value is not None})
    notes: tuple[str, ...] = ()
    if dense_from is not None:
        if dense_time is not None or len(state.gpus) != 1:
            raise InputError("--dense-from: expected one GPU in --hardware, and no --dense-time")
        from simulator.prediction.measured import measured

        shapes = ((state.batch, state.seq),)
        found = measured(dense_from, replace(state.scenario, model=state.load(), phase=state.phase, shapes=shapes))
        state, notes = replace(state, dense_ms=1e3 * found.seconds), found.notes
    size = write_report(state, output)
    if as_json:
        render.show_json({"file": output, "bytes": size})
    else:
        print(output)
    render.notes(notes)


def _engine(name: str) -> str:
    """Return the name of a shipped engine, else its path."""
    from simulator.engines.engine import list_engines, load_engine

    found = load_engine(name)
    return found.name if found.name in list_engines() and load_engine(found.name).path == found.path else name


def _start(model: str) -> State:
    """Return the state of an address, or the page's initial state with a model."""
    from simulator.explore.address import strict_query
    from simulator.explore.dropped import PREFIX
    from simulator.explore.state import State
    from simulator.models.library import list_models, load_model

    if model.startswith(("http://", "https://", "?")):
        return strict_query(model.partition("?")[2])
    if model.startswith(PREFIX):
        return State(model=model)
    loaded = load_model(model)
    shipped = loaded.name in list_models() and load_model(loaded.name) == loaded
    return State(model=loaded.name if shipped else model)
