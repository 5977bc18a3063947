"""``prunesim figures``: every figure of a paper about a model, into one folder, with a list of
captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from calibration.cli.fit import load_rows
from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.request import Name

if TYPE_CHECKING:
    from calibration.records.timing_table import Records
    from simulator.figures.measured import MeasuredGemms
    from simulator.figures.paper import Drawn, Paper
    from simulator.hardware.profile import HardwareProfile

HARDWARE, FORMATS = "a100_sxm_80gb,h100_sxm,rtx_4090", "pdf,png"


REQUEST: options.Run = options.run_options("seq", "engine", "dtype")


@options.expanded("csv", "figure")
def command(
    model: options.Model,
    output: Annotated[
        str, opt("-o --output", "DIR", "Folder to write to; made if it does not exist.")
    ],
    hardware: Annotated[
        str, opt("--hardware", "LIST", "Devices: names, aliases or YAML files.")
    ] = HARDWARE,
    only: Annotated[str | None, opt("--only", "LIST", "Draw these figures alone.")] = None,
    formats: Annotated[str, opt("--format", "LIST", "pdf, png, svg.")] = FORMATS,
    run: options.Run = REQUEST,
    measured: Annotated[
        list[str] | None,
        opt(
            "--measured",
            "DEVICE=FILE",
            "Measured GEMMs of a device: a table as prunesim fit reads it; repeatable.",
        ),
    ] = None,
    width: options.Width = None,
    font: options.Font = None,
    out: options.Output = options.OUTPUT,
) -> None:
    """Draw the figures of a paper about a model.

    Each figure is written in every format, and captions.md lists them with their captions. A figure
    without data (measured GEMMs, quality of the model) is omitted with a note, or refused when
    --only names it.
    """
    from simulator.display import markdown_text
    from simulator.explore.content import command as line
    from simulator.figures.paper import FIGURES, NothingToDraw, draw, paper
    from simulator.figures.style import SUFFIXES, PaperSize, save_figure
    from simulator.files.write import refuse_links, write_whole

    known, chosen = Name(tuple(suffix[1:] for suffix in SUFFIXES)), list(FIGURES)
    if only:
        chosen = [
            Name(tuple(FIGURES)).check("figure", name) for name in parsing.names("--only", only)
        ]
    suffixes = [f".{known.check('format', name)}" for name in parsing.names("--format", formats)]
    asked = options.single(run.asked().settings)
    about = paper(model, parsing.names("--hardware", hardware), **asked)
    missing: list[str] = []
    if "scatter" in chosen:  # the figure of measured GEMMs
        about = _with_measured(about, measured or [], about.dtype, missing, bool(only))
    folder, size = Path(output), PaperSize.read(width, font)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    drawn: list[Drawn] = []
    with size.applied(), render.progress("drawing") as report:
        for i, name in enumerate(chosen):
            try:
                drawn.append(draw(name, about))
                for suffix in suffixes:
                    save_figure(drawn[-1].figure, folder / f"{name}{suffix}")
            except NothingToDraw as error:
                if only:
                    raise
                missing.append(str(error))
            report(i + 1, len(chosen))
    given: dict[str, Any] = {"hardware": hardware, "format": formats, "width": width, "font": font}
    given |= {**run.given, "measured": measured}
    page = ["# Figures"]
    for d in drawn:
        picture = f"{d.name}{'.png' if '.png' in suffixes else suffixes[0]}"
        words = line("figures", model, {"output": "DIR", "only": d.name, **given})
        page += [f"## {d.name}", f"![{d.name}]({picture})", markdown_text(d.caption), f"`{words}`"]
    write_whole(folder / "captions.md", ("\n\n".join(page) + "\n").encode())
    files = [[f"{folder / d.name}{suffix}" for suffix in suffixes] for d in drawn]
    if out.json:
        rows = zip(drawn, files)
        render.show_json([{"name": d.name, "caption": d.caption, "files": f} for d, f in rows])
    else:
        print(*(f"{folder / d.name}{'|'.join(suffixes)}" for d in drawn), sep="\n")
        print(folder / "captions.md")
    render.notes((*missing, *(note for d in drawn for note in d.notes)), out.verbose)


def _with_measured(
    about: Paper, files: list[str], dtype: str, notes: list[str], needed: bool
) -> Paper:
    """Return the paper with the measured GEMMs of its devices, and append notes on excluded rows. A
    shipped table that cannot be read is a note too, unless it is needed."""
    from simulator.hardware.library import load_hardware

    found: dict[str, MeasuredGemms] = {}
    try:
        tables = {hw.label: shipped_gemms(hw, dtype) for hw in about.devices}
        found = {name: table for name, table in tables.items() if table is not None}
    except InputError as error:
        if needed:
            raise
        notes.append(str(error))
    example = "DEVICE=FILE, such as rtx_4090=gemms.csv"
    pairs = [parsing.pair("--measured", text, example) for text in files]
    devices = [load_hardware(name) for name, _ in pairs]
    for hw, (_, path) in zip(devices, pairs):
        if hw.label not in [known.label for known in about.devices]:
            raise InputError(f"--measured: {hw.label} is not among --hardware")
        if devices.count(hw) > 1:
            raise InputError(f"--measured: expected one table of {hw.label}")
        rows, more = load_rows([path], hw)
        if (table := gemms_of_format(rows, dtype, Path(path).name)) is None:
            raise InputError(f"{path}: no GEMM of {dtype}")
        found[hw.label] = table
        notes += more
    return replace(about, measured=found)


def shipped_gemms(hw: HardwareProfile, dtype: str) -> MeasuredGemms | None:
    """Return the first installed table of a stack of a device; None without rows of the number
    format."""
    from calibration.measurements import (
        hardware_of,
        list_measurements,
        load_measurements,
        provenance,
    )

    tables = {
        name.split("/")[2]: name
        for name in list_measurements()
        if hardware_of(name) == hw.name and "/gemm/" in name
    }
    for stack in [hw.stack] if hw.pinned else hw.stacks:
        if name := tables.get(stack):
            about = provenance(name)
            source = f"{about['framework']} {about['version']}, aiconfigurator-core 0.12.0"
            return gemms_of_format(load_measurements(name), dtype, source, stack)
    return None


def gemms_of_format(
    rows: Records, dtype: str, source: str, stack: str = ""
) -> MeasuredGemms | None:
    from calibration.fit.gemm import weight_copies
    from simulator.figures.measured import MeasuredGemms

    r = rows.select(rows.is_operator("gemm") & (rows.labels() == dtype))
    return (
        MeasuredGemms(source, r.m, r.n, r.k, r.seconds, weight_copies(r), stack) if len(r) else None
    )
