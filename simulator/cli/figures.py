"""``prunesim figures``: every figure of a paper about a model, into one folder, with a list of captions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.figures.paper import Drawn, Paper
    from simulator.figures.paper_measured import MeasuredGemms
    from simulator.hardware.profile import HardwareProfile

    Known = Callable[[HardwareProfile, str], MeasuredGemms | None]

MODEL, HARDWARE, FORMATS = "llama-3.1-8b", "a100_sxm_80gb,h100_sxm,rtx_4090", "pdf,png"

Output = Annotated[
    str, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to; made if it does not exist.")
]
Model = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="Name of a model, or its Hugging Face config.json.")
]
Only = Annotated[str | None, typer.Option("--only", metavar="LIST", help="Draw these figures alone.")]
Formats = Annotated[str, typer.Option("--format", metavar="LIST", help="pdf, png, svg.")]
MeasuredFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--measured",
        metavar="DEVICE=FILE",
        help="Measured GEMMs of a device (CSV, Parquet): m, n, k, seconds; may be repeated.",
    ),
]


def figures_command(known: Known | None = None) -> Callable[..., None]:
    """The command, with measurements that come from elsewhere than files.

    Parameters
    ----------
    known : callable, optional
        From a profile and a number format to its measured GEMMs, or None; a file given with ``--measured`` goes before it.
    """

    def figures(
        output: Output,
        model: Model = MODEL,
        hardware: options.Hardware = HARDWARE,
        only: Only = None,
        formats: Formats = FORMATS,
        seq: Annotated[
            int, typer.Option("--seq", metavar="N", help="Tokens of a prompt or positions of a cache.")
        ] = 2048,
        runtime: options.Runtime = "cuda_graph",
        dtype: options.Dtype = "bf16",
        measured: MeasuredFiles = None,
        as_json: options.Json = False,
    ) -> None:
        """Draw the figures of a paper about a model.

        Each figure is written in every format, and captions.md lists them with their captions. What lacks its data (measured GEMMs, quality
        of the model) is left out with a note, or refused when --only names it.
        """
        from simulator.figures.paper import FIGURES, NothingToDraw, draw, paper
        from simulator.figures.save import SUFFIXES
        from simulator.predict.settings import one_of, whole_number

        chosen = (
            [one_of("figure", name, tuple(FIGURES)) for name in options.names("--only", only)]
            if only
            else list(FIGURES)
        )
        suffixes = [
            f".{one_of('format', name, [s[1:] for s in SUFFIXES])}" for name in options.names("--format", formats)
        ]
        setting = options.setting(128, runtime, dtype, None, None, 1, "tensor")
        about = paper(model, options.names("--hardware", hardware), setting=setting, seq=whole_number("seq", seq))
        about = _with_measured(about, measured or [], known, dtype)
        folder = _folder(output)
        drawn: list[Drawn] = []
        with render.progress("drawing") as report:
            for i, name in enumerate(chosen):
                try:
                    drawn.append(draw(name, about))
                except NothingToDraw as error:
                    if only:
                        raise
                    render.note(str(error))
                else:
                    _save(drawn[-1], folder, suffixes)
                report(i + 1, len(chosen))
        _write_captions(
            drawn,
            folder,
            suffixes,
            {
                "--model": (model, MODEL),
                "--hardware": (hardware, HARDWARE),
                "--only": (only, None),
                "--format": (formats, FORMATS),
                "--seq": (str(seq), "2048"),
                "--runtime": (runtime, "cuda_graph"),
                "--dtype": (dtype, "bf16"),
            },
            measured or [],
        )
        if as_json:
            print(
                json.dumps(
                    [
                        {
                            "name": d.name,
                            "caption": d.caption,
                            "files": [str(folder / f"{d.name}{s}") for s in suffixes],
                        }
                        for d in drawn
                    ],
                    indent=2,
                )
            )
        else:
            for d in drawn:
                print(f"{folder / d.name}{'|'.join(suffixes)}")
            print(folder / "captions.md")
        for line in dict.fromkeys(line for d in drawn for line in d.notes):
            render.note(line)

    return figures


figures = figures_command()


def _with_measured(about: Paper, files: list[str], known: Known | None, dtype: str) -> Paper:
    """The paper with the measured GEMMs of its devices."""
    from dataclasses import replace

    from simulator.figures.paper_measured import read_measured_gemms
    from simulator.hardware.library import load_hardware

    found: dict[str, MeasuredGemms] = {}
    for hw in about.devices if known else ():
        assert known is not None
        table = known(hw, dtype)
        if table is not None:
            found[hw.name] = table
    given: dict[str, str] = {}
    for text in files:
        name, equals, path = (part.strip() for part in text.partition("="))
        if not (name and equals and path):
            raise InputError(f"--measured {text!r}: expected DEVICE=FILE, such as rtx_4090=gemms.csv")
        device = load_hardware(name).name
        if device not in [hw.name for hw in about.devices]:
            raise InputError(f"--measured {text!r}: {device} is not among --hardware")
        if device in given:
            raise InputError(f"--measured {text!r}: {device} is given twice")
        given[device] = path
        found[device] = read_measured_gemms(path, dtype)
    return replace(about, measured=found)


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(drawn: Drawn, folder: Path, suffixes: list[str]) -> None:
    from simulator.figures.save import save_figure

    for suffix in suffixes:
        save_figure(drawn.figure, folder / f"{drawn.name}{suffix}")


def _write_captions(
    drawn: list[Drawn],
    folder: Path,
    suffixes: list[str],
    given: dict[str, tuple[str | None, str | None]],
    measured: list[str],
) -> None:
    """A list of the figures with their captions and the command of each."""
    from simulator.figures.paper import MEASURED
    from simulator.files.write import write_whole

    chosen = [
        (name, value)
        for name, (value, default) in given.items()
        if value is not None and value != default and name != "--only"
    ]
    rest = [part for pair in chosen for part in pair]
    files = [part for text in measured for part in ("--measured", text)]
    shown = ".png" if ".png" in suffixes else suffixes[0]
    lines = ["# Figures", ""]
    for d in drawn:
        command = shlex.join(
            ["prunesim", "figures", "-o", "DIR", "--only", d.name, *rest, *(files if d.name in MEASURED else ())]
        )
        lines += [f"## {d.name}", "", f"![{d.name}]({d.name}{shown})", "", d.caption, "", f"`{command}`", ""]
    write_whole(folder / "captions.md", "\n".join(lines).encode())
