"""Notebooks: committed notebooks have outputs, and the comparison with an execution notices
changes."""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)


def picture(at: int = 40, size: tuple[int, int] = (200, 120)) -> dict[str, Any]:
    """An output: a figure with a bar that begins at a column."""
    image, out = Image.new("RGB", size, "white"), io.BytesIO()
    ImageDraw.Draw(image).rectangle((at, 30, at + 24, 90), fill="navy")
    image.save(out, "PNG")
    return {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(out.getvalue()).decode()},
    }


def printed(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def notebook(*outputs: dict[str, Any], tags: tuple[str, ...] = ()) -> dict[str, Any]:
    code = {"cell_type": "code", "metadata": {"tags": list(tags)}, "outputs": list(outputs)}
    return {"cells": [{"cell_type": "markdown"}, code]}


# as a file has it: the keys in order, the text in lines
TABLE = {
    "output_type": "execute_result",
    "data": {"text/html": "<td>1.31 (1.29-1.33)</td>", "text/plain": ["1.31\n"]},
}
SHOWN = notebook(printed("host (x0.830)\n 1,234 tokens\n"), TABLE, picture())


def changed(at: int, output: dict[str, Any]) -> dict[str, Any]:
    now = copy.deepcopy(SHOWN)
    now["cells"][1]["outputs"][at] = output
    return now


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            changed(0, printed("host (x0.830)\n 1,334 tokens\n")),
            "line 2 of text: expected '1,234 tokens', got '1,334 tokens'",
        ),
        (
            changed(
                1, {**TABLE, "data": {**TABLE["data"], "text/html": "<td>1.31 (1.29-1.36)</td>"}}
            ),
            "(1.29-1.36)",
        ),
        (notebook(), "got no output"),
        (changed(2, picture(size=(240, 120))), "expected 200 x 120 pixels, got 240 x 120"),
        (
            changed(2, picture(at=60)),
            "picture: expected squares within 0.15 of black to white, got 0.",
        ),
    ],
)
def test_a_difference_is_told_in_one_line(now: dict[str, Any], told: str) -> None:
    (line,) = run.differences(SHOWN, now)
    assert line.startswith("cell 2")
    assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            {"output_type": "error", "ename": "KeyError", "evalue": "'h100'"},
            "cell 2: KeyError: 'h100'",
        ),
        (
            printed("UserWarning: deprecated\n", "stderr"),
            "cell 2: writes to standard error: UserWarning",
        ),
        (printed(f"{tempfile.gettempdir()}/records.jsonl"), "a path of this machine"),
        (printed("9" * 500_000), "shows 500 kB; expected at most 400"),
    ],
)
def test_what_no_notebook_may_show(output: dict[str, Any], told: str) -> None:
    (line,) = run.faults(notebook(output))
    assert told in line


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebooks_show_their_outputs(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) > len(code) / 2
    assert list(run.faults(content)) == []
