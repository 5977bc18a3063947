"""``prunesim hardware``: list devices, show one, check a profile, write a new one."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options, render
from simulator.cli.options import arg

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

app = typer.Typer(help="Devices: list them, show one, check a profile.")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the shipped devices."""
    from simulator.hardware.library import list_hardware, load_hardware

    profiles = [load_hardware(name) for name in list_hardware()]
    if json:
        render.show_json([_facts(hw) for hw in profiles])
        return
    columns = render.columns(
        profiles,
        ("<name", lambda hw: hw.name),
        ("<architecture", lambda hw: hw.architecture),
        ("bf16 dense", lambda hw: _rate(hw.rates["bf16"].flop_per_s if "bf16" in hw.rates else None)),
        ("memory", lambda hw: render.size(hw.memory_bytes)),
        ("bandwidth", lambda hw: render.rate(hw.bandwidth_bytes_per_s, "B/s")),
        ("<stacks", _stacks),
        (
            "<also",
            lambda hw: min((a for a in hw.aliases if "nvidia" not in a and hw.name not in a), key=len, default=""),
        ),
    )
    render.show(render.narrowed(columns, 2))


@app.command()
def show(
    name: Annotated[str, arg("NAME", "Name, alias or YAML file, NAME@STACK.", "--hardware")], json: options.Json = False
) -> None:
    """Show one device: datasheet, sources, fits.

    Prints datasheet facts with their sources, and stack, status, accuracy and section scale of each fitted section: the
    factor on correlated and independent errors at which 90 % of the held-out rows of its table are covered.
    """
    from simulator.hardware.library import load_hardware
    from simulator.hardware.link import choices
    from simulator.operators.base import unfitted
    from simulator.operators.gemm import GEMM_CONSTANTS

    hw = load_hardware(name)
    if json:
        render.show_json([hw.to_dict()])
        return
    facts = [
        ("architecture", hw.architecture),
        ("SMs", str(hw.sm_count)),
        ("clocks", f"{hw.boost_clock_hz / 1e9:.3g} GHz boost, {hw.max_clock_hz / 1e9:.3g} GHz highest"),
        ("memory", f"{render.size(hw.memory_bytes)} at {render.rate(hw.bandwidth_bytes_per_s, 'B/s')}"),
        ("L2", render.size(hw.l2_bytes)),
        ("power", f"{hw.power_w:.0f} W"),
    ]
    if hw.link is not None:
        speed = f"{render.rate(hw.link.bandwidth_bytes_per_s, 'B/s')} one way, {render.seconds(hw.link.latency_s)}"
        others = ", ".join(choices(hw.link, hw.bridge)[1:])
        facts.append(("link", f"{hw.link.text}, {speed}; others with --link: {others}"))
    if hw.bridge is not None:
        speed = f"{render.rate(hw.bridge.bandwidth_bytes_per_s, 'B/s')} one way, {render.seconds(hw.bridge.latency_s)}"
        facts.append(("bridge", f"{hw.bridge.kind} between two devices, {speed}; --link bridge"))
    also = f" (also {', '.join(hw.aliases)})" if hw.aliases else ""
    print(f"{hw.title}: {hw.label}{also}\n")
    render.show(render.columns(facts, ("<datasheet", lambda fact: fact[0]), ("<", lambda fact: fact[1])))
    print()
    render.show(
        render.columns(
            list(hw.rates.items()),
            ("<format", lambda item: item[0]),
            ("dense", lambda item: _rate(item[1].flop_per_s)),
            ("<accumulate", lambda item: item[1].accumulate),
            ("2:4", lambda item: f"x{item[1].sparse_factor:g}"),
            ("ridge point", lambda item: f"{item[1].flop_per_s / hw.bandwidth_bytes_per_s:.0f} FLOP/B"),
        )
    )
    print("\nsources")
    values: dict[str, list[str]] = {}
    for key, text in hw.sources.items():
        values.setdefault(text, []).append(key)
    for text, keys in values.items():
        print(f"  {', '.join(keys)}:\n    {text}")
    print()
    if hw.local_update is not None:
        about = hw.local_update.provenance
        print(f"re-anchored: {about.rows} rows measured on {about.device} with {about.software}\n")
    sections = hw.to_dict()["sections"]
    if not sections:
        generic = "generic" in unfitted(hw.section("gemm", next(iter(hw.rates))), GEMM_CONSTANTS, hw.architecture)
        of = f"generic defaults (no {hw.architecture} GPU was ever fitted)" if generic else "architecture defaults"
        print(f"not calibrated: {of} and wide intervals")
        return
    columns = render.columns(
        sections,
        ("<fitted part", lambda s: s["operator"]),
        ("<format", lambda s: s["dtype"]),
        ("<stack", lambda s: s["stack"] or "own"),
        ("<status", lambda s: s["status"]),
        ("rows", lambda s: s["rows"] or ""),
        ("error, p95", lambda s: _accuracy(s["accuracy"])),
        ("section scale", lambda s: f"{s['section_scale']:.2g}"),
    )
    room = max(render.width() - render.table_width(columns) - 2, 12)
    render.show(
        [
            *columns,
            *render.columns(sections, ("<from", lambda s: textwrap.shorten(s["origin"], room, placeholder="..."))),
        ]
    )


@app.command()
def check(file: Annotated[str, arg("FILE", "YAML profile or stack file.")], as_json: options.Json = False) -> None:
    """Check a YAML profile and its stack files, or one of these.

    Each problem is one line; the exit status is 2 when there is any.
    """
    from simulator.hardware.library import check_hardware

    render.checked(file, check_hardware(file), as_json)


@app.command()
def new(
    name: Annotated[str, arg("NAME", "Name of the GPU: lower-case letters, digits, _ - and .")],
    out: Annotated[str, options.opt("--output -o", "FILE", "File to write. Default: NAME.yaml.")] = "",
    as_json: options.Json = False,
) -> None:
    """Write a commented profile of a GPU to fill in."""
    from simulator.hardware.library import new_hardware

    path = new_hardware(name, out)
    if as_json:
        render.show_json({"file": str(path)})
    else:
        print(f"{path}: replace each FILL_IN by a value, then run: prunesim hardware check {path}")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e12:.4g} TFLOP/s"


def _stacks(hw: HardwareProfile) -> str:
    """Return the stacks that a device was fitted on, the default first; or the related GPU of inherited sections."""
    names = [stack or "own" for stack in hw.stacks]
    sibling = f"as {hw.stacks_of}" if hw.stacks_of else ""
    if sibling and all(s.status == "inherited" for sections in hw.stacks.values() for s in sections.values()):
        return sibling
    return ", ".join(names) or "none"


def _accuracy(values: dict[str, float]) -> str:
    return ", ".join(f"{100.0 * values[name]:.2g} %" for name in ("mape", "p95") if name in values)


def _facts(hw: HardwareProfile) -> dict[str, Any]:
    """Return the values of a device for a list."""
    return {name: value for name, value in hw.to_dict().items() if name not in ("sources", "sections")}
