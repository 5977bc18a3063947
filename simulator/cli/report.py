"""``prunesim report``: the page of a selection as one HTML file to pass on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.explore.state import State


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Name of a model, its config.json, or the address of a page of prunesim explore."
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="HTML file to write.")],
    hardware: Annotated[
        str | None, typer.Option("--hardware", metavar="LIST", help="Devices: names, aliases or YAML files.")
    ] = None,
    family: Annotated[str | None, typer.Option("--family", metavar="LIST", help="Pruning families, or all.")] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", metavar="LIST", help="Fractions removed, points of the curves.")
    ] = None,
    phase: Annotated[str | None, typer.Option("--phase", metavar="NAME", help="prefill, decode or generate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help="Sequences in a batch.")] = None,
    seq: Annotated[
        int | None, typer.Option("--seq", metavar="N", help="Prompt tokens or cached positions of a sequence.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", metavar="N", help="Tokens that generate decodes.")
    ] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", metavar="NAME", help="cuda_graph or eager.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="Number format.")] = None,
    detail: Annotated[
        str | None, typer.Option("--detail", metavar="NAME", help="Family of waterfall, roofline and bounds.")
    ] = None,
    at: Annotated[
        float | None, typer.Option("--at", metavar="FRACTION", help="Sparsity of waterfall, roofline and map.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a selection as one HTML file.

    The file holds the figures of prunesim explore, the table, the notes and the commands, opens from disk and fetches nothing. Options that
    are left out are as the page starts with. Needs the extra "explore".
    """
    from simulator.files.write import check_target

    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: expected a name that ends in .html")
    check_target(output)
    from simulator.explore.report import write_report

    given: dict[str, Any] = {
        "phase": phase,
        "batch": batch,
        "seq": seq,
        "new_tokens": new_tokens,
        "runtime": runtime,
        "dtype": dtype,
        "detail": detail,
        "at": at,
    }
    if hardware is not None:
        given["gpus"] = tuple(dict.fromkeys(_device(name) for name in options.names("--hardware", hardware)))
    if family is not None:
        from simulator.predict.table import families

        given["families"] = families(options.names("--family", family))
    if sparsity is not None:
        given["sparsities"] = tuple(dict.fromkeys(options.fractions("--sparsity", sparsity)))
    state = replace(_start(model), **{name: value for name, value in given.items() if value is not None})
    size = write_report(state, output)
    print(json.dumps({"file": output, "bytes": size}) if as_json else output)


def _start(model: str) -> State:
    """The state of an address, or the page's first one with a model."""
    from simulator.explore.dropped import PREFIX
    from simulator.explore.state import State, strict_query
    from simulator.models.library import list_models, load_model

    if model.startswith(("http://", "https://", "?")):
        return strict_query(model.partition("?")[2])
    if model.startswith(PREFIX):
        return State(model=model)
    loaded = load_model(model)
    shipped = loaded.name in list_models() and load_model(loaded.name) == loaded
    return State(model=loaded.name if shipped else model)


def _device(name: str) -> str:
    """A shipped device by its name, another one by its path."""
    from simulator.hardware.library import load_hardware
    from simulator.hardware.names import list_hardware

    found = load_hardware(name).name
    return found if found in list_hardware() and load_hardware(found) is load_hardware(name) else name
