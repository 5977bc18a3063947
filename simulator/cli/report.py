"""``prunesim report``: write predictions as one HTML file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError


@options.expanded()
def command(
    model: options.Model,
    output: Annotated[str, opt("-o --output", "FILE", "HTML file to write.")],
    hardware: options.Hardware,
    family: Annotated[str | None, opt("--family", "LIST", "Pruning families. Default: all.")] = None,
    method: options.Method = None,
    pruned: options.Pruned = None,
    prune: options.Prune = None,
    sparsity: Annotated[str | None, opt("--sparsity", "LIST", "Fractions removed, as in prunesim speedup.")] = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    ideal: options.Ideal = False,
    option: options.Option = None,
    same_stack: options.SameStack = False,
    as_json: options.Json = False,
) -> None:
    """Write predictions as one HTML file.

    The file begins with the answer, then has figures, the table of prunesim speedup, where the fastest pruning loses
    its nominal speedup, notes, and the commands that print the same numbers. It has no scripts and loads nothing.
    """
    from simulator.files.write import check_target, write_whole

    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: expected a name that ends in .html")
    check_target(output)
    from simulator.explore.content import command as line
    from simulator.explore.content import commands, content
    from simulator.explore.report import report_html
    from simulator.hardware.library import load_hardware

    requested = run.requests(known, model=model, ideal=ideal)
    asked: dict[str, Any] = {
        "models": model,
        "hardware": [load_hardware(name) for name in parsing.devices(hardware, same_stack)],
        "family": None if family is None else parsing.names("--family", family),
        "sparsity": None if sparsity is None else parsing.fractions("--sparsity", sparsity),
        "phase": requested.phase,
        "batch": requested.batch,
        "seq": requested.seq,
        "method": [] if method is None else parsing.names("--method", method),
        "pruned": [] if pruned is None else parsing.names("--pruned", pruned),
        "prune": prune or [],
        "engine": requested.engine,
        "scenario": requested.scenario,
        "options": parsing.settings("--option", option),
    }
    found = content(asked)
    given: dict[str, Any] = {
        "hardware": hardware,
        "family": family,
        "method": method,
        "sparsity": sparsity,
        "pruned": pruned,
    }
    given |= {"prune": prune, "option": option, "ideal": ideal, "same_stack": same_stack}
    defaults = asdict(options.RUN) | {"phase": None, "batch": None, "seq": None}
    given |= {name: value for name, value in asdict(run).items() if value != defaults[name]} | asdict(known)
    if run.concurrency is not None:
        given["batch"] = None
    lines = [*commands(model, given, found), line("report", model, {**given, "output": output})]
    text = report_html(found, lines).encode()
    write_whole(output, text)
    if as_json:
        render.show_json({"file": output, "bytes": len(text)})
    else:
        print(output)
    render.notes(requested.notes)
