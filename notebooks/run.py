"""Execute the notebooks of this folder and compare what they show with what is committed, so that it stays true.

Usage: ``python notebooks/run.py [--write] [NAME.ipynb ...]``; ``--write`` keeps the new outputs instead.

Text is compared word by word and number by number, pictures by their size and by the mean of every small square, which
letters drawn a pixel aside do not change. Numbers of a cell with the tag ``fitted`` come out of an optimiser and may
differ by more.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).resolve().parent

TOLERANCE, FITTED = 1e-3, 0.05
"""Relative difference of two numbers that passes, and that of fitted ones."""

PIXELS, SQUARE, SHADE = 6, 16, 0.15
"""Pictures may differ by so many pixels in width and height; squares of so many, by so much of black to white."""

MOST_KB = 400
"""What a notebook may show, so that it loads at once."""

_NUMBER = re.compile(r"(?:(?<![\w.])|(?<=\bx))[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def execute(path: Path) -> Any:
    """The notebook with fresh outputs, which say neither when nor where it ran."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # no word of the kernel on its ports, no time stamps
    options = {
        "timeout": 600,
        "extra_arguments": ["--log-level=ERROR"],
        "record_timing": False,
        "allow_errors": True,
    }
    options["coalesce_streams"] = (
        True  # a print that reaches the kernel in two parts is still one output
    )
    NotebookClient(
        notebook, **options, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.metadata.pop("language_info", None)  # names the version of Python
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """A picture (base64, as notebooks have it) in 64 colours, which takes a third of the bytes."""
    out = io.BytesIO()
    _image(png).convert("RGB").quantize(64).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode() + "\n"


def faults(notebook: Mapping[str, Any]) -> Iterator[str]:
    """What no notebook may show, a line each: errors, warnings, paths of this machine, too much."""
    outputs = [
        (i, o) for i, cell in enumerate(notebook["cells"], 1) for o in cell.get("outputs", ())
    ]
    for i, output in outputs:
        if output["output_type"] == "error":
            yield f"cell {i}: {output['ename']}: {output['evalue']}"
        if output.get("name") == "stderr":
            yield f"cell {i}: writes to standard error: {_texts(output)['text'].splitlines()[0]}"
        for path in (str(FOLDER.parent), tempfile.gettempdir()):
            if any(path in text for text in _texts(output).values()):
                yield f"cell {i}: shows {path}, a path of this machine"
    if (size := sum(len(str(output)) for _, output in outputs) // 1000) > MOST_KB:
        yield f"shows {size} kB; expected at most {MOST_KB}"


def differences(shown: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Where a notebook does not show what executing it gives: the cell, what was expected and got, a line each."""
    for i, (old, new) in enumerate(zip(shown["cells"], now["cells"], strict=True), 1):
        if old["cell_type"] != "code":
            continue
        kinds, others = (
            ", ".join(map(_kind, cell["outputs"])) or "no output" for cell in (old, new)
        )
        if kinds != others:
            yield f"cell {i}: expected {kinds}, got {others}"
            continue
        tolerance = FITTED if "fitted" in old["metadata"].get("tags", ()) else TOLERANCE
        for a, b in zip(old["outputs"], new["outputs"]):
            yield from (
                f"cell {i}, {line}" for line in (*_in_text(a, b, tolerance), *_in_picture(a, b))
            )


def _kind(output: Mapping[str, Any]) -> str:
    return " and ".join(sorted(output.get("data", ()))) or output.get("name", output["output_type"])


def _texts(output: Mapping[str, Any]) -> dict[str, str]:
    """All that is text in an output, by its format."""
    data = {"text": output.get("text", ""), **output.get("data", {})}
    return {name: "".join(value) for name, value in data.items() if name.startswith("text")}


def _in_text(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    """The first line that differs."""
    texts = _texts(new)
    for name, text in _texts(old).items():
        pairs = itertools.zip_longest(text.splitlines(), texts[name].splitlines(), fillvalue="")
        wrong = [(n, a, b) for n, (a, b) in enumerate(pairs, 1) if not _alike(a, b, tolerance)]
        for number, a, b in wrong[:1]:
            more = f", and {len(wrong) - 1} more lines" if len(wrong) > 1 else ""
            yield f"line {number} of {name}: expected {a.strip()!r}, got {b.strip()!r}{more}"


def _alike(a: str, b: str, tolerance: float) -> bool:
    """Equal words, with any blanks between them, and numbers that differ by no more than the tolerance."""
    words, others = (_NUMBER.sub("#", line).split() for line in (a, b))
    numbers, found = ([float(n.replace(",", "")) for n in _NUMBER.findall(line)] for line in (a, b))
    return words == others and all(abs(x - y) <= tolerance * abs(x) for x, y in zip(numbers, found))


def _in_picture(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if "image/png" not in old.get("data", {}):
        return
    a, b = (_image(output["data"]["image/png"]) for output in (old, new))
    if max(abs(x - y) for x, y in zip(a.size, b.size)) > PIXELS:
        yield "picture: expected {} x {} pixels, got {} x {}".format(*a.size, *b.size)
        return
    wide, high = (min(pair) // SQUARE for pair in zip(a.size, b.size))
    apart = float(np.abs(_shades(a, wide, high) - _shades(b, wide, high)).max())
    if apart > SHADE:
        yield f"picture: expected squares within {SHADE:g} of black to white, got {apart:.2f}"


def _image(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def _shades(image: Image.Image, wide: int, high: int) -> NDArray[np.float64]:
    """Means of the first squares of a picture, from 0 (black) to 1."""
    pixels = np.asarray(image.convert("L"))[: high * SQUARE, : wide * SQUARE] / 255.0
    return np.asarray(pixels.reshape(high, SQUARE, wide, SQUARE).mean(axis=(1, 3)))


def main(arguments: list[str]) -> int:
    import nbformat

    write, names = "--write" in arguments, [a for a in arguments if a != "--write"]
    wrong = 0
    for path in [FOLDER / Path(name).name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        now = execute(path)
        found = list(faults(now))
        if not write:
            found += differences(nbformat.read(path, as_version=4), now)
        elif not found:
            nbformat.write(now, path)
        print(
            "\n".join(f"{path.name}: {line}" for line in found)
            or f"{path.name}: {len(now.cells)} cells as shown"
        )
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
