"""``prunesim hardware``: what devices there are, what is known of one, whether a profile is sound."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options, render

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

app = typer.Typer(help="Devices: list them, show one, check a profile.")


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the devices that ship."""
    from simulator.hardware.library import load_hardware
    from simulator.hardware.names import list_hardware

    profiles = [load_hardware(name) for name in list_hardware()]
    if json:
        print(render.json_lines([_summary(hw) for hw in profiles]))
        return
    rows = [_summary(hw) for hw in profiles]
    columns = [
        render.Column("name", [hw.name for hw in profiles], right=False),
        render.Column("architecture", [hw.architecture for hw in profiles], right=False),
        render.Column("bf16 dense", [_rate(row["peak_flop_per_s"].get("bf16")) for row in rows]),
        render.Column("memory", [render.size(hw.memory_bytes) for hw in profiles]),
        render.Column("bandwidth", [render.rate(hw.bandwidth_bytes_per_s, "B/s") for hw in profiles]),
        render.Column("calibrated", [", ".join(row["calibrated"]) or "no" for row in rows], right=False),
        render.Column("also", [", ".join(sorted(hw.aliases, key=len)[:2]) for hw in profiles], right=False),
    ]
    while len(columns) > 2 and render.table_width(columns) > render.width():
        columns.pop()
    render.show(columns)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name, alias or YAML file.")], json: options.Json = False
) -> None:
    """Show one device: datasheet, sources, fits.

    Datasheet facts come with their sources, each fitted part with its status and accuracy.
    """
    from simulator.hardware.library import load_hardware

    hw = load_hardware(name)
    if json:
        print(render.json_lines([{**_summary(hw), "sources": dict(hw.sources), "sections": _sections(hw)}]))
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
        facts.append(
            (
                "link",
                f"{hw.link.kind}, {render.rate(hw.link.bandwidth_bytes_per_s, 'B/s')} one way, {render.seconds(hw.link.latency_s)}",
            )
        )
    also = f" (also {', '.join(hw.aliases)})" if hw.aliases else ""
    print(f"{hw.title}: {hw.name}{also}\n")
    render.show(
        [
            render.Column("datasheet", [k for k, _ in facts], right=False),
            render.Column("", [v for _, v in facts], right=False),
        ]
    )
    print()
    rates = list(hw.rates.items())
    ridge = [rate.flop_per_s / hw.bandwidth_bytes_per_s for _, rate in rates]
    render.show(
        [
            render.Column("format", [dtype for dtype, _ in rates], right=False),
            render.Column("dense", [_rate(rate.flop_per_s) for _, rate in rates]),
            render.Column("accumulate", [rate.accumulate for _, rate in rates], right=False),
            render.Column("2:4", [f"x{rate.sparse_factor:g}" for _, rate in rates]),
            render.Column("ridge point", [f"{value:.0f} FLOP/B" for value in ridge]),
        ]
    )
    print("\nsources")
    values: dict[str, list[str]] = {}
    for key, text in hw.sources.items():
        values.setdefault(text, []).append(key)
    for text, keys in values.items():
        print(f"  {', '.join(keys)}:\n    {text}")
    print()
    sections = _sections(hw)
    if not sections:
        print("not calibrated: architecture defaults and wide intervals")
        return
    render.show(
        [
            render.Column("fitted part", [s["operator"] for s in sections], right=False),
            render.Column("format", [s["dtype"] for s in sections], right=False),
            render.Column("status", [s["status"] for s in sections], right=False),
            render.Column("rows", [str(s["rows"] or "") for s in sections]),
            render.Column("accuracy", [_accuracy(s["accuracy"]) for s in sections], right=False),
            render.Column("from", [s["origin"] for s in sections], right=False),
        ]
    )


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML profile.")], as_json: options.Json = False
) -> None:
    """Check a YAML profile.

    Each problem is one line; the exit status is 2 when there is any.
    """
    from simulator.hardware.library import check_hardware

    problems = check_hardware(file)
    if as_json:
        print(json.dumps({"file": file, "problems": problems}, indent=2))
    else:
        for problem in problems:
            typer.echo(f"prunesim: {problem}", err=True)
    if problems:
        raise typer.Exit(2)
    if not as_json:
        print(f"{file}: no problem found")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e12:.4g} TFLOP/s"


def _accuracy(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in list(values.items())[:3])


def _summary(hw: HardwareProfile) -> dict[str, Any]:
    """Facts of a profile as plain values."""
    sections = [key for key, section in hw.sections.items() if section.status == "calibrated"]
    return {
        "name": hw.name,
        "title": hw.title,
        "vendor": hw.vendor,
        "architecture": hw.architecture,
        "aliases": list(hw.aliases),
        "peak_flop_per_s": {dtype: rate.flop_per_s for dtype, rate in hw.rates.items()},
        "sm_count": hw.sm_count,
        "boost_clock_hz": hw.boost_clock_hz,
        "max_clock_hz": hw.max_clock_hz,
        "memory_bytes": hw.memory_bytes,
        "bandwidth_bytes_per_s": hw.bandwidth_bytes_per_s,
        "l2_bytes": hw.l2_bytes,
        "power_w": hw.power_w,
        "link": asdict(hw.link) if is_dataclass(hw.link) else None,
        "calibrated": [f"{operator} {dtype}".replace(" *", "") for operator, dtype in sections],
    }


def _sections(hw: HardwareProfile) -> list[dict[str, Any]]:
    """Fitted parts of a profile as plain values."""
    out = []
    for (operator, dtype), section in hw.sections.items():
        origin = section.provenance
        out.append(
            {
                "operator": operator,
                "dtype": dtype,
                "status": section.status,
                "constants": {name: asdict(fitted) for name, fitted in section.constants.items()},
                "accuracy": {name: float(value) for name, value in section.accuracy.items()},
                "rows": origin.rows if origin else 0,
                "origin": (f"borrowed from {origin.borrowed_from}" if origin.borrowed_from else origin.software)
                if origin
                else "",
            }
        )
    return out
