"""``prunesim engines``: list engines, show one, check a file."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render
from simulator.cli.options import arg

if TYPE_CHECKING:
    from simulator.engines.engine import Engine

app = typer.Typer(help="Engines: list them, show one, check a file.")


_EXPERTS = {"grouped": "together", "touched": "one by one: those in use", "all": "one by one: all"}


@app.command("list")
def list_(as_json: options.Json = False) -> None:
    """List the shipped engines."""
    from simulator.engines.engine import DEFAULT_ENGINE, list_engines, load_engine

    engines = [load_engine(name) for name in list_engines()]
    if as_json:
        render.show_json([e.to_dict() for e in engines])
        return
    columns = render.columns(
        engines,
        ("<name", lambda e: e.name + (" (default)" if e.name == DEFAULT_ENGINE else "")),
        ("<software", lambda e: e.title),
        ("<host", _host),
        ("<2:4 kernels", lambda e: ", ".join(f for kernels in e.sparse24.values() for f in kernels.formats) or "none"),
        ("<one GEMM for", lambda e: ", ".join(e.fuse) or "each projection"),
    )
    render.show(render.narrowed(columns, 2))


@app.command()
def show(
    name: Annotated[str, arg("NAME", "Name, alias or YAML file.", "--engine")], as_json: options.Json = False
) -> None:
    """Show one engine: each value with its source."""
    from simulator.engines.engine import load_engine

    engine = load_engine(name)
    if as_json:
        render.show_json([engine.to_dict()])
        return
    also = f" (also {', '.join(engine.aliases)})" if engine.aliases else ""
    print(f"{engine.title}: {engine.name}{also}\n")
    for one in engine.generations:
        current = " (these values)" if one.name == engine.generation else ""
        print(f"{engine.name.partition('@')[0]}@{one.name}, from {one.since}: {one.title} [{one.source}]{current}")
    if engine.generations:
        print()
    rows = list(_values(engine))
    columns = render.columns(rows, ("<", lambda r: r[0]), ("<value", lambda r: r[1]), ("<host sd", lambda r: r[2]))
    room = max(render.width() - render.table_width(columns) - 2, 20)
    sources = [textwrap.shorten(r[3], room, placeholder="...") for r in rows]
    render.show([*columns, render.Column("source", sources, right=False)])
    fill = partial(textwrap.fill, width=render.width(), break_long_words=False, break_on_hyphens=False)
    print("\nsources")
    for short, text in engine.sources.items():
        print(fill(f"  {short}: {text}", subsequent_indent="    "))
    for line in engine.notes:
        print(f"\n{fill(line)}")


@app.command()
def check(file: Annotated[str, arg("FILE", "YAML file of an engine.")], as_json: options.Json = False) -> None:
    """Check a YAML file of an engine.

    Each problem is one line; the exit status is 2 when there is any.
    """
    from simulator.engines.engine import check_engine

    render.checked(file, check_engine(file), as_json)


def _host(e: Engine) -> str:
    """Return the host time of an engine as text."""
    parts = [] if e.graph else ["every launch"]
    parts += [f"{render.seconds(e.each_pass.value)}/pass"] if e.each_pass.value else []
    parts += [f"{render.seconds(e.each_sequence.value)}/sequence"] if e.each_sequence.value else []
    return " + ".join(parts) or "hidden"


def _values(e: Engine) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, value, spread over hosts and source of each value of an engine."""
    yield "kernels of", ", ".join(e.stacks), "", "the first that a profile has"
    yield "one GEMM for", ", ".join(e.fuse) or "each projection", "", ""
    yield "CUDA graph", ", ".join(e.graph) or "none", "", ""
    yield "prompt logits", e.logits, "", ""
    yield "cache", e.cache, "", ""
    yield "routed experts", _EXPERTS[e.experts], "", ""
    for role, many in e.launches.items():
        yield f"launches, {role}", str(many) if many else "none: part of another kernel", "", ""
    times = {"host per pass": e.each_pass, "host per sequence": e.each_sequence, "gap in a graph": e.gap}
    for name, time in times.items():
        if time.value:
            spread = f"x{math.exp(time.log_sd):.2f}"
            yield name, render.seconds(time.value), spread, f"{time.source}{f': {time.note}' if time.note else ''}"
    if e.host_correlation.source:
        source = f"{e.host_correlation.source}{f': {e.host_correlation.note}' if e.host_correlation.note else ''}"
        yield "correlation of host times", f"{e.host_correlation.value:g}", "", source
    if e.schedule is not None:
        for x in e.schedule.limits:
            unless = f" except {', '.join(x.not_on)}" if x.not_on else ""
            where = f", GPUs from {render.size(x.memory)}{unless}" if x.memory else ""
            yield f"step{where}", f"{x.tokens:,} tokens, {x.sequences:,} sequences", "", e.schedule.source
        yield "longer prompts", "in chunks" if e.schedule.chunked else "whole", "", e.schedule.source
        yield "prompts of neighbouring steps", f"together up to {e.schedule.clustered:,} tokens", "", e.schedule.note
    shares = {
        "memory of a server": e.memory,
        "GEMM of one token": e.one_token,
        "wait for other prompts": e.prefill_wait,
        "wait of first tokens (sd)": e.first_wait_sd,
        "custom modelling code": e.own_code,
        "unexplained (log sd)": e.log_sd,
    }
    for name, share in shares.items():
        if share.source:
            yield name, f"{share.value:g}", "", f"{share.source}{f': {share.note}' if share.note else ''}"
    source = f"{e.quantize.source}{f': {e.quantize.note}' if e.quantize.note else ''}"
    yield "activations converted by a kernel", ", ".join(e.quantize.inputs) or "none", "", source
    yield "weight-only formats", ", ".join(e.weight_only) or "none", "", ""
    for library, found in e.sparse24.items():
        where = f"on {', '.join(found.on)}" if found.on else ""
        plan = "" if found.searched else "one plan for all shapes"
        said = "; ".join(text for text in (plan, found.note) if text)
        yield f"2:4, {library}", ", ".join(found.formats), where, f"{found.source}{f': {said}' if said else ''}"
    if not e.sparse24:
        yield "2:4 formats", "none", "", ""
    for family, kernels in e.dynamic.items():
        where = f"on {', '.join(kernels.on)}" if kernels.on else ""
        yield f"kernels, {family}", "yes", where, f"{kernels.source}: {kernels.how}"
    for dtype, width in e.widths.items():
        yield f"widths, {dtype}", f"multiples of {width.multiple}", "", width.source
    for feature, loading in e.loads.items():
        yield f"loads, {feature}", "yes" if loading.value else "no", "", f"{loading.source}: {loading.how}"
