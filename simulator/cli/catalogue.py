"""``prunesim hardware``, ``models``, ``engines``: list what is known by name, show one, check a
file."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options, render
from simulator.cli.options import arg, option
from simulator.display import with_and
from simulator.errors import InputError
from simulator.request import DEFAULT_DTYPE, Request

if TYPE_CHECKING:
    from simulator.engines.engine import Engine
    from simulator.hardware.profile import EngineTimes, HardwareProfile
    from simulator.models.model import Model

hardware = typer.Typer(help="Devices: list them, show one, check a profile.")


@hardware.command("list")
def _list_devices(json: options.Json = False) -> None:
    """List the shipped devices."""
    from simulator.hardware.library import list_hardware, load_hardware

    profiles = [load_hardware(name) for name in list_hardware()]
    if json:
        rows = [hw.to_dict() for hw in profiles]
        render.show_json(
            [{k: v for k, v in row.items() if k not in ("sources", "sections")} for row in rows]
        )
        return

    def also(hw: HardwareProfile) -> str:
        return min(
            (a for a in hw.aliases if "nvidia" not in a and hw.name not in a), key=len, default=""
        )

    columns = render.columns(
        profiles,
        ("<name", "name"),
        ("<architecture", "architecture"),
        (
            "bf16 dense",
            lambda hw: _tflops(hw.rates["bf16"].flop_per_s if "bf16" in hw.rates else None),
        ),
        ("memory", "memory_bytes", render.size),
        ("bandwidth", lambda hw: render.rate(hw.bandwidth_bytes_per_s, "B/s")),
        ("<stacks", _stacks),
        ("<also", also),
    )
    render.show(render.narrowed(columns, 2))


@hardware.command("show")
def _show_devices(
    name: Annotated[str, arg("NAME", "Name, alias or YAML file, NAME@STACK.", "--hardware")],
    json: options.Json = False,
) -> None:
    """Show one device: datasheet, sources, fits.

    Prints datasheet facts with their sources, as a profile states them, and per operator and engine
    the software stack whose fit is used, with its mean error on held-out rows. "datasheet": no fit
    is used, only defaults.
    """
    from simulator.files.fields import lines_of
    from simulator.hardware.library import load_hardware
    from simulator.hardware.profile import link_choices
    from simulator.hardware.save import facts_of
    from simulator.operators.base import unfitted
    from simulator.operators.gemm import GEMM_CONSTANTS

    hw = load_hardware(name)
    if json:
        render.show_json([{**hw.to_dict(), "served": _served(hw)}])
        return
    if hw.verdict:
        print(f"its calibration advised against this profile: {hw.verdict}\n")
    for line in lines_of(facts_of(hw)):
        render.say(line, "      ")
    print(f"\ndrawn: {_drawn(hw)}")
    if hw.link is not None:
        print(f"other links (--link): {', '.join(link_choices(hw.link, hw.bridge)[1:])}")
    print()
    for engine, times in hw.engines.items():
        _show_engine_times(engine, times)
    if rows := _served(hw):
        _show_fits(rows)
    else:
        gemms = hw.section("gemm", next(iter(hw.rates)))
        generic = "generic" in unfitted(gemms, GEMM_CONSTANTS, hw.architecture)
        of = (
            f"generic defaults (no {hw.architecture} GPU was ever fitted)"
            if generic
            else "architecture defaults"
        )
        print(f"not calibrated: {of} and wide intervals")


def _drawn(hw: HardwareProfile) -> str:
    """Return what the device draws idle and at its full rates, and how that is known."""
    from simulator.power import Power

    power, section = Power.of(hw), hw.section("power", "*")
    idle, active, memory, compute = power.watts
    moving, computing = (min(idle + active + part, power.limit) for part in (memory, compute))
    about = section.provenance
    known = f"{section.status}: {about.source.partition(' (')[0]}" if about else "assumed"
    full = f"{moving:.0f} W at full bandwidth, {computing:.0f} W at full arithmetic"
    return f"{idle:.0f} W idle, {full} ({known})"


def _show_engine_times(engine: str, times: EngineTimes) -> None:
    host = " + ".join(
        f"{render.seconds(getattr(times, f'each_{part}'))} per {part}" for part in HOST_PARTS
    )
    print(
        f"engine {engine} {times.version}, {times.source}: host {host}; measured over predicted"
        " time by tokens:"
    )
    render.show(
        render.columns(
            list(times.operators.items()),
            ("<operator", lambda item: item[0]),
            *(
                (f"{tokens:,}", lambda item, i=i: f"{item[1].factors[i]:.2f}")
                for i, tokens in enumerate(times.tokens)
            ),
            ("scatter", lambda item: f"{100 * math.expm1(item[1].log_sd):.0f} %"),
        )
    )
    print()


def _show_fits(rows: Sequence[Mapping[str, Any]]) -> None:
    groups: dict[tuple[str, ...], list[str]] = {}  # cells of a column -> engines
    for engine in rows[0]["engines"]:
        cells = tuple(_fit_text(row["engines"][engine]) for row in rows)
        groups.setdefault(cells, []).append(engine)
    columns = render.columns(rows, ("<fitted part", "operator"), ("<format", "dtype"))
    for cells, engines in groups.items():
        title = textwrap.fill(", ".join(engines), 14) if len(groups) > 1 else "every engine"
        columns.append(render.Column(title, cells))
    render.show(columns)
    print()
    if unseen := [*dict.fromkeys(row["held_out"] for row in rows if row["held_out"])]:
        folds = "5-fold cross-validation, 10-fold up to 1,500 GEMMs"
        page = "docs/generated/accuracy.md has the same errors of all shipped fits"
        render.conclude(
            f"Errors are means over rows of unseen {with_and(unseen)} ({folds}); {page}."
        )
    _show_origins(rows)
    for origin in dict.fromkeys(
        fit["fitted_on"] for row in rows for fit in row["engines"].values()
    ):
        if origin:
            render.conclude(
                f"Kernels fitted on {origin} were never measured on this GPU: the errors are those"
                f" of {origin}, and intervals include how far GPUs of one architecture differ."
            )


def _fit_text(fit: Mapping[str, Any]) -> str:
    error = "" if fit["error"] is None else f" {100 * fit['error']:.1f} %"
    return f"{fit['stack']}{error}"


def _show_origins(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows and origins of each stack whose fits are used."""
    stacks: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        for fit in row["engines"].values():
            if fit["status"] != "default":
                stacks.setdefault(fit["stack"], {})[row["operator"], row["dtype"]] = fit
    for stack, fits in stacks.items():
        origins = [fit["origin"].partition(" (")[0] for fit in fits.values()]
        names = {origin.casefold(): origin for origin in origins}  # VLLM and vLLM are the same
        count = sum(fit["rows"] for fit in fits.values())
        text = f"{stack}, {count:,} rows: {', '.join(names.values())}"
        print(textwrap.shorten(text, render.width(), placeholder="..."))


def _served(hw: HardwareProfile) -> list[dict[str, Any]]:
    """Return each fitted operator and format with the fit that each engine takes."""
    from simulator.engines.engine import list_engines, load_engine
    from simulator.hardware.profile import HELD_OUT, section_row
    from simulator.operators import CONSTANTS

    served = {name: load_engine(name).serving(hw) for name in list_engines()}
    keys = dict.fromkeys(key for one in served.values() for key in one.sections)

    def fit(hw: HardwareProfile, operator: str, dtype: str) -> dict[str, Any]:
        row = section_row(hw.name, operator, dtype, hw.section(operator, dtype))
        stack = "datasheet" if row["status"] == "default" else row["stack"] or "own"
        kept = {name: row[name] for name in ("status", "rows", "origin")}
        origin = hw.fitted_on(hw.section(operator, dtype))
        return {"stack": stack, **kept, "error": row["accuracy"].get("mape"), "fitted_on": origin}

    return [
        {
            "operator": operator,
            "dtype": dtype,
            "held_out": HELD_OUT.get(operator, ""),
            "engines": {name: fit(one, operator, dtype) for name, one in served.items()},
        }
        for operator, dtype in sorted(keys, key=lambda key: list(CONSTANTS).index(key[0]))
    ]


@hardware.command("check")
def _check_devices(
    file: Annotated[str, arg("FILE", "YAML profile or stack file.")], as_json: options.Json = False
) -> None:
    """Check a YAML profile and its stack files, or one of these.

    Each problem is one line; the exit status is 2 when there is any. Facts outside the range of
    the architecture are warnings.
    """
    from simulator.hardware.library import check_hardware, hardware_warnings

    problems = check_hardware(file)
    render.checked(file, problems, as_json, [] if problems else hardware_warnings(file))


@hardware.command("new")
@options.expanded()
def _new_devices(
    name: Annotated[str, arg("NAME", "Name of the GPU: lower-case letters, digits, _ - and .")],
    out: str = option("FILE", "File to write. Default: NAME.yaml.", "", flags="--output -o"),
    as_json: options.Json = False,
) -> None:
    """Write a commented profile of a GPU to fill in."""
    from simulator.hardware.library import new_hardware

    path = new_hardware(name, out)
    if as_json:
        render.show_json({"file": str(path)})
    else:
        print(
            f"{path}: replace each FILL_IN by a value, run: prunesim hardware check {path}, then"
            f" use --hardware {path}"
        )


HOST_PARTS = ("pass", "layer", "sequence")


def _tflops(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e12:.4g} TFLOP/s"


def _stacks(hw: HardwareProfile) -> str:
    """Return the stacks that a device was fitted on, the default first; or the related GPU of
    inherited sections."""
    names = [stack or "own" for stack in hw.stacks]
    sibling = f"as {hw.stacks_of}" if hw.stacks_of else ""
    if sibling and all(
        s.status == "inherited" for sections in hw.stacks.values() for s in sections.values()
    ):
        return sibling
    return ", ".join(names) or "none"


models = typer.Typer(help="Models: list those known by name, show the shapes of one.")


@models.command("list")
def _list_models(json: options.Json = False) -> None:
    """List the models known by name."""
    from simulator.models.library import list_models, load_model

    models = [load_model(name) for name in list_models()]
    if json:
        render.show_json([m.to_dict() for m in models])
        return
    columns = render.columns(
        models,
        ("<name", "name"),
        ("parameters", lambda m: f"{m.parameters:,}"),
        ("active", lambda m: f"{m.active_parameters / 1e9:.3g}e9" if m.experts else ""),
        ("layers", "layers", len),
        ("hidden", "hidden"),
        ("heads", lambda m: f"{m.heads}/{m.kv_heads}"),
        ("inner", lambda m: m.inner or ""),
        ("experts", lambda m: f"{m.experts}/{m.active:g}" if m.experts else ""),
        ("vocabulary", lambda m: f"{m.vocab:,}"),
        ("<architecture", "architecture"),
    )
    render.show(render.narrowed(columns, 2))


_SHAPES = 3  # most different shapes of one kind of sublayer that are shown


def _shapes(model: Model) -> str:
    """Return the numbers and shapes of all kinds of sublayers."""
    kinds: dict[str, Counter[str]] = {}
    for layer in model.layers:
        for sublayer in layer.sublayers:
            if sublayer.label:
                kinds.setdefault(sublayer.label, Counter())[sublayer.shape] += 1
    texts = []
    for label, shapes in kinds.items():
        if len(shapes) <= _SHAPES:
            texts += [f"{many} {label} ({shape})" for shape, many in shapes.items()]
        else:
            texts.append(f"{shapes.total()} {label} (mostly {shapes.most_common(1)[0][0]})")
    size = f"{len(model.layers)} layers, hidden {model.hidden}, vocabulary {model.vocab:,}"
    return f"{size}: {', '.join(texts)}"


@models.command("show")
@options.expanded()
def _show_models(
    name: Annotated[
        str, arg("NAME", "Name of a model, or its config.json (file or folder).", "MODEL")
    ],
    batch: int = option("N", "Sequences in a batch.", 1),
    seq: int = option("N", "Prompt tokens of a sequence.", 2048),
    json: options.Json = False,
) -> None:
    """Show one model: shapes, parameters, GEMMs."""
    from simulator.codes import ROLES, Kind
    from simulator.models.library import load_model
    from simulator.models.lower import lower
    from simulator.models.quantization import stated_text

    if min(batch, seq) < 1:
        raise InputError(f"batch {batch}, seq {seq}: expected whole numbers from 1 up")
    model = load_model(name)
    # number formats change no shape, so a format that is not understood does not matter here
    weights = model.weight_dtype or DEFAULT_DTYPE
    workload = lower(model, phase="prefill", batch=batch, seq=seq, weight_dtype=weights)
    gemms = workload.take((workload.kind == Kind.GEMM) | (workload.kind == Kind.EXPERTS))
    total = float(workload.flops.sum())
    rows: dict[tuple[str | int, ...], dict[str, Any]] = {}  # different layers may share shapes
    for i in range(len(gemms)):
        shape = {
            "role": ROLES[gemms.role[i]],
            **{key: int(getattr(gemms, key)[i]) for key in ("m", "n", "k")},
        }
        row = rows.setdefault(tuple(shape.values()), {**shape, "count": 0.0, "flops": 0.0})
        row |= {key: row[key] + float(getattr(gemms, key)[i]) for key in ("count", "flops")}
    if json:
        render.show_json([{**model.to_dict(), "flops": total, "gemms": list(rows.values())}])
        return
    active = f", {model.active_parameters:,} of them active" if model.experts else ""
    size = render.size(2.0 * model.parameters)
    print(
        f"{model.name} ({model.architecture}): {model.parameters:,} parameters{active}, {size} in"
        " 16 bits"
    )
    print(f"{textwrap.fill(_shapes(model), render.width())}\n")
    if unread := model.unread_format:
        print(f"number formats: {unread} is not understood\n")
    elif stated := stated_text(model):
        print(f"number formats: {stated}\n")
    columns = render.columns(
        list(rows.values()),
        ("<GEMM", "role"),
        ("M", "m"),
        ("N", "n"),
        ("K", "k"),
        ("times", lambda r: f"{r['count']:g}"),
        ("share of FLOPs", lambda r: render.percent(r["flops"] / total)),
    )
    render.show(columns, f"prefill, batch {batch}, seq {seq}: {total:.4g} FLOP")
    if model.found:
        render.notes([model.found])


engines = typer.Typer(help="Engines: list them, show one, check a file.")


@engines.command("list")
def _list_engines(as_json: options.Json = False) -> None:
    """List the shipped engines."""
    from simulator.engines.engine import list_engines, load_engine

    engines = [load_engine(name) for name in list_engines()]
    if as_json:
        render.show_json([e.to_dict() for e in engines])
        return
    columns = render.columns(
        engines,
        ("<name", lambda e: e.name + (" (default)" if e.name == Request.engine else "")),
        ("<software", "title"),
        (
            "<older releases",
            lambda e: ", ".join(
                f"{e.name}@{g.name}" for g in e.generations if g.name != e.generation
            ),
        ),
        ("<host", _host),
        (
            "<2:4 kernels",
            lambda e: (
                ", ".join(f for kernels in e.sparse24.values() for f in kernels.formats) or "none"
            ),
        ),
        ("<one GEMM for", lambda e: ", ".join(e.fuse) or "each projection"),
    )
    render.show(render.narrowed(columns, 2))


@engines.command("show")
def _show_engines(
    name: Annotated[str, arg("NAME", "Name, alias or YAML file.", "--engine")],
    as_json: options.Json = False,
) -> None:
    """Show one engine as a file: each value with its source.

    To change an engine, redirect the output into a file, which --engine and engines check accept.
    """
    from simulator.engines.engine import SCHEMA_VERSION, Behaviour, HostBlock, load_engine
    from simulator.files.fields import kind_of, quoted

    engine = load_engine(name)
    if as_json:
        render.show_json([engine.to_dict()])
        return
    own = engine.name.partition("@")[0]
    print(f"# {', '.join((engine.name, *engine.aliases))}")
    for one in engine.generations:
        current = " (these values)" if one.name == engine.generation else ""
        print(f"# {own}@{one.name}, from {one.since}: {one.title} [{one.source}]{current}")
    # defaults without a source
    unstated: dict[str, Any] = {
        part.name: None
        for part in fields(Behaviour)
        if is_dataclass(part.default) and getattr(engine, part.name) == part.default
    }
    host = HostBlock(
        **{
            part.name: time
            for part in fields(HostBlock)
            if (time := getattr(engine, part.name)).source
        }
    )
    lines = (
        f"schema_version: {SCHEMA_VERSION}",
        f"name: {own}",
        f"title: {quoted(engine.title)}",
        f"stacks: [{', '.join(engine.stacks)}]",
        *kind_of(Behaviour).lines(replace(engine, **unstated), ""),
        *(("host:", *kind_of(HostBlock).lines(host, "  ")) if host != HostBlock() else ()),
        "sources:",
        *(f"  {short}: {quoted(text)}" for short, text in engine.sources.items()),
    )
    for line in lines:
        render.say(line, "      ")


@engines.command("check")
def _check_engines(
    file: Annotated[str, arg("FILE", "YAML file of an engine.")], as_json: options.Json = False
) -> None:
    """Check a YAML file of an engine.

    Each problem is one line; the exit status is 2 when there is any.
    """
    from simulator.engines.engine import check_engine

    render.checked(file, check_engine(file), as_json)


def _host(e: Engine) -> str:
    parts = [] if e.graph else ["every launch"]
    parts += [f"{render.seconds(e.each_pass.value)}/pass"] if e.each_pass.value else []
    parts += [f"{render.seconds(e.each_sequence.value)}/sequence"] if e.each_sequence.value else []
    return " + ".join(parts) or "hidden"
