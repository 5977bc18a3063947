"""Figures: the same bytes for the same arrays, embedded fonts, nothing outside the page, no two texts on top of each
other.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.figures.roofline import Roof, roofline_figure
from simulator.figures.save import check_figure, save_figure
from simulator.figures.speedup import speedup_figure
from simulator.figures.style import COLUMN_IN, LOOKS, PAGE_IN, in_order, look
from simulator.figures.waterfall import Steps, waterfall_figure
from simulator.pruning import FAMILIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = [
    "rounding",
    "parts not pruned",
    "memory-bound operators",
    "tile quantisation",
    "alignment",
    "launch",
    "host time",
]


def points(families: list[str], sparsities: list[float], rows: list[str], columns: list[str]) -> dict[str, Any]:
    """Arrays of a made-up but plausible grid."""
    grid = list(itertools.product(rows, columns, families, sparsities))
    rng = np.random.default_rng(3)
    s = np.array([g[3] for g in grid])
    bound = 1 / (1 - 0.95 * s)
    speed = 1 + (bound - 1) * rng.uniform(-0.3, 1.0, len(grid))
    return {
        "row": [g[0] for g in grid],
        "column": [g[1] for g in grid],
        "family": [g[2] for g in grid],
        "sparsity": s,
        "speedup": speed,
        "lower": speed * 0.93,
        "upper": speed * 1.08,
        "bounds": {"FLOP bound": bound, "roofline bound": 0.98 * bound},
    }


def steps(title: str, factors: list[float]) -> Steps:
    reached = 1.333 * float(np.prod(factors))
    return Steps(title, NAMES, factors, 1.333, 0.95 * reached, 1.06 * reached)


def roof(title: str, tokens: float, peak: float = 989.4e12, bandwidth: float = 3.35e12) -> Roof:
    n = np.array([4096.0, 1024, 1024, 4096, 14336, 14336, 4096])
    k = np.array([4096.0, 4096, 4096, 4096, 4096, 4096, 14336])
    intensity = np.concatenate([tokens * w * k / (tokens * (w + k) + w * k) for w in (n, 0.75 * n)])
    achieved = np.minimum(0.75 * peak, intensity * 0.8 * bandwidth) * np.tile([1.0, 0.8, 0.8, 1.0, 1.05, 1.05, 0.97], 2)
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    return Roof(title, peak, bandwidth, names * 2, intensity, achieved, [False] * 7 + [True] * 7)


def figures() -> dict[str, Figure]:
    """One of each kind, at the sizes that are printed."""
    every = list(LOOKS)
    gpus = ["a100_sxm_80gb", "h100_sxm", "rtx_4090"]
    settings = ["prefill, batch 1", "prefill, batch 64", "decode, batch 1", "decode, batch 64"]
    return {
        "dots": speedup_figure(**points(every, [0.1, 0.25, 0.5], settings, gpus)),
        "dots, one device": speedup_figure(**points(every, [0.1, 0.5], settings[:1], gpus[:1])),
        "dots, five devices": speedup_figure(**points(every, [0.1, 0.5], settings[:1], [*gpus, "l40s", "h200_sxm"])),
        "dots, one point": speedup_figure(**points(["depth"], [0.3], settings[:1], gpus[:1])),
        "dots, long label": speedup_figure(
            **points(every[:3], [0.3], ["llama-3.1-8b, generate, batch 64, 128 new, seq 2048"], gpus)
        ),
        "curves": speedup_figure(**points(["depth", "width", "low_rank"], [0.1, 0.25, 0.5], settings[:2], gpus)),
        "curves, all": speedup_figure(**points(every, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], settings[:1], gpus)),
        "waterfall": waterfall_figure([steps("h100_sxm", [0.99, 0.9, 1.03, 0.97, 1.0, 0.95, 0.83])]),
        "waterfalls": waterfall_figure(
            [steps(f"{g}, reference", [1.0, 0.9, 1.0, 0.97, 0.75, 0.8, 1.06]) for g in gpus]
        ),
        "roofline": roofline_figure([roof("h100_sxm", 2048.0)]),
        "rooflines": roofline_figure([roof(g, m) for g, m in zip(gpus, (2048.0, 64.0, 1.0), strict=True)]),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return figures()


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".png"])
def test_the_same_arrays_give_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    for name, first in figures().items():
        if name in ("dots", "waterfall", "rooflines"):
            save_figure(first, tmp_path / f"1{suffix}")
            save_figure(figures()[name], tmp_path / f"2{suffix}")
            assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes(), name


def test_the_bytes_do_not_depend_on_the_users_settings_or_the_process(tmp_path: Path) -> None:
    code = (
        "import sys; import matplotlib; from simulator.figures.save import *;"
        "from simulator.figures.waterfall import *;"
        "matplotlib.rcParams.update({'font.size': 30, 'axes.grid': False, 'svg.hashsalt': 'other'});"
        "panel = Steps('x', ['a', 'b'], [0.9, 1.1], 1.3, 1.2, 1.4); save_figure(waterfall_figure([panel]), sys.argv[1])"
    )
    root = Path(__file__).resolve().parents[2]
    for suffix in (".svg", ".pdf"):
        here = tmp_path / f"here{suffix}"
        save_figure(waterfall_figure([Steps("x", ["a", "b"], [0.9, 1.1], 1.3, 1.2, 1.4)]), here)
        there = tmp_path / f"there{suffix}"
        subprocess.run([sys.executable, "-c", code, str(there)], check=True, cwd=root)
        assert here.read_bytes() == there.read_bytes()


def test_pdf_fonts_are_embedded_truetype(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    save_figure(drawn["waterfall"], tmp_path / "x.pdf")
    content = (tmp_path / "x.pdf").read_bytes()
    streams = [
        zlib.decompress(s) for s in re.findall(rb"stream\n(.*?)\nendstream", content, re.DOTALL) if s[:1] == b"\x78"
    ]
    everything = content + b"".join(streams)
    assert b"/FontFile2" in everything  # TrueType programs
    assert b"/Type3" not in everything
    assert b"CreationDate" not in everything


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """Visible texts of a figure with their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and _shown(figure, text):
            found.append((text.get_text(), text.get_window_extent(renderer)))
    return found


def _shown(figure: Figure, text: Any) -> bool:
    """Whether a text is really drawn: tick labels outside the axes' limits or switched off are not."""
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                if text is tick.label1:
                    low, high = sorted(axis.get_view_interval())
                    return bool(
                        tick.label1.get_visible() and low <= tick.get_loc() <= high and tick in axis._update_ticks()
                    )
                if text is tick.label2:
                    return bool(tick.label2.get_visible())
    return True


def check_print(figure: Figure) -> None:
    """A width of a paper's columns, no taller than its page, and no text off the page or on top of another."""
    assert figure.get_size_inches()[0] in (COLUMN_IN, PAGE_IN)
    assert figure.get_size_inches()[1] <= 9.5
    found = texts(figure)
    assert len(found) > 5
    for text, box in found:
        assert min(box.x0, box.y0) >= -1, (text, box)
        assert box.x1 <= figure.bbox.width + 1, (text, box)
        assert box.y1 <= figure.bbox.height + 1, (text, box)
    for (one, a), (other, b) in itertools.combinations(found, 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) <= 1.5, (one, other, overlap)


@pytest.mark.parametrize("name", list(figures()))
def test_figures_print_without_clashes(name: str, drawn: dict[str, Figure]) -> None:
    check_print(drawn[name])


def test_every_family_has_a_look_of_its_own() -> None:
    assert set(LOOKS) == set(FAMILIES)
    assert len({(a.marker, a.color, a.hollow) for a in LOOKS.values()}) == len(LOOKS)
    assert len({(a.marker, a.hollow) for a in LOOKS.values()}) == len(LOOKS)  # apart in grey print too
    for name, family in FAMILIES.items():
        if name not in ("token", "kv_cache", "sparse_attention"):
            assert look(name).hollow == family.dynamic, name
    assert in_order(reversed(list(LOOKS))) == list(LOOKS)


def test_points_are_drawn_where_they_are() -> None:
    data = points(["depth", "width"], [0.1, 0.5], ["decode"], ["h100"])
    (ax,) = speedup_figure(**data).axes
    lines = {line.get_color(): line for line in ax.lines if line.get_marker() in "os" and len(line.get_xdata()) == 2}
    for name in ("depth", "width"):
        own = [i for i, f in enumerate(data["family"]) if f == name]
        np.testing.assert_allclose(lines[look(name).color].get_xdata(), 100 * data["sparsity"][own])
        np.testing.assert_allclose(lines[look(name).color].get_ydata(), data["speedup"][own])


def test_a_waterfall_ends_at_the_product_of_its_factors() -> None:
    factors = [0.99, 0.9, 1.03, 0.97, 1.0, 0.95, 0.83]
    (ax,) = waterfall_figure([steps("x", factors)]).axes
    last = ax.patches[-1]
    assert last.get_x() + last.get_width() == pytest.approx(1.333 * np.prod(factors))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: check_figure("x.jpg"), "x.jpg: expected a name that ends in .pdf, .svg or .png"),
        (lambda: check_figure("x"), "expected a name that ends in"),
        (lambda: check_figure("no/such/folder/x.pdf"), "does not exist"),
        (lambda: speedup_figure([], [], [], [], [], [], []), "expected columns of one length"),
        (
            lambda: speedup_figure(["a"], ["b"], ["depth"], [0.1, 0.2], [1.0], [1.0], [1.0]),
            "expected columns of one length",
        ),
        (lambda: waterfall_figure([]), "expected one panel or more"),
        (
            lambda: waterfall_figure([Steps("a", ["x"], [1.0], 1, 1, 1), Steps("b", ["y"], [1.0], 1, 1, 1)]),
            "the same steps",
        ),
        (lambda: roofline_figure([]), "expected one device or more"),
        (lambda: roofline_figure([Roof("a", 1.0, 1.0, ["q"], [1.0, 2.0], [1.0], [False])]), "columns of one length"),
    ],
)
def test_bad_input_is_one_line(call: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_figure_is_written_whole_or_not_at_all(
    tmp_path: Path, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise PermissionError("planted")

    monkeypatch.setattr("simulator.files.write.os.replace", refuse)
    with pytest.raises(PermissionError):
        save_figure(drawn["waterfall"], target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    save_figure(drawn["waterfall"], target)
    assert target.read_bytes().startswith(b"\x89PNG")
