"""Figures: equal bytes for equal predictions, embedded fonts, nothing outside the page, no
overlapping texts."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from printing import check_print

import simulator
from calibration.cli.figures import gemms_of_format, shipped_gemms
from calibration.cli.fit import load_rows
from simulator.cli import run
from simulator.engines.engine import list_engines
from simulator.errors import InputError
from simulator.figures import style
from simulator.figures.gemms import Roof, roofline_figure
from simulator.figures.pareto import fronts_of
from simulator.figures.speedup import speedups_of
from simulator.figures.waterfall import Steps, waterfall_figure
from simulator.hardware.library import list_hardware, load_hardware
from simulator.models.library import list_models, load_model, model_title
from simulator.prediction.pareto import frontier, fronts
from simulator.prediction.quality import choose_axis, load_quality
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
    "host",
]


def speedups(
    families: list[str],
    sparsities: list[float],
    gpus: list[str],
    phases: Any = "prefill",
    **axes: Any,
) -> Any:
    rows = simulator.table("llama-3.1-8b", gpus, families, sparsities, phase=phases, **axes).rows
    return speedups_of(rows)


def steps(title: str, factors: list[float]) -> Steps:
    reached = 1.333 * float(np.prod(factors))
    return Steps(title, NAMES, factors, 1.333, 0.95 * reached, 1.06 * reached)


def roof(
    title: str,
    tokens: float,
    peak: float = 989.4e12,
    bandwidth: float = 3.35e12,
    headroom: float = 1.08,
) -> Roof:
    n = np.array([4096.0, 1024, 1024, 4096, 14336, 14336, 4096])
    k = np.array([4096.0, 4096, 4096, 4096, 4096, 4096, 14336])
    intensity = np.concatenate([tokens * w * k / (tokens * (w + k) + w * k) for w in (n, 0.75 * n)])
    achieved = np.minimum(0.75 * peak, intensity * 0.8 * bandwidth) * np.tile(
        [1.0, 0.8, 0.8, 1.0, 1.05, 1.05, 0.97], 2
    )
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    return Roof(
        title, peak, bandwidth, names * 2, intensity, achieved, [False] * 7 + [True] * 7, headroom
    )


GPUS = ["a100_sxm_80gb", "h100_sxm", "rtx_4090"]
BOTH: dict[str, Any] = {"phases": ["prefill", "decode"], "batch": [1, 64]}
FOUR, SIX = ["depth", "width", "token", "low_rank"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
# one of each kind, at the sizes that are printed
FIGURES: dict[str, Callable[[], Figure]] = {
    "dots": lambda: speedups(["all"], [0.1, 0.25, 0.5], GPUS, **BOTH),
    "dots, five devices": lambda: speedups(["all"], SIX[::4], [*GPUS, "l40s", "h200_sxm"]),
    "dots, one point": lambda: speedups(["depth"], [0.3], GPUS[:1]),
    "dots, two rows": lambda: speedups(
        FOUR, [0.3], GPUS, ["prefill", "decode", "generate"], batch=[1, 64]
    ),
    "curves": lambda: speedups(FOUR[:2], [0.1, 0.25, 0.5], GPUS, batch=[1, 64]),
    "curves, one device": lambda: speedups(FOUR[:2], SIX, GPUS[:1]),
    "curves, all": lambda: speedups(
        ["all"], SIX, GPUS[:2], ["prefill", "decode", "generate"], batch=[1, 8, 64]
    ),
    "waterfall": lambda: waterfall_figure(
        [steps("h100_sxm", [0.99, 0.9, 1.03, 0.97, 1.0, 0.95, 0.83])]
    ),
    "waterfalls": lambda: waterfall_figure(
        [steps(f"{g}, reference", [1.0, 0.9, 1.0, 0.97, 0.75, 0.8, 1.06]) for g in GPUS]
    ),
    "roofline": lambda: roofline_figure([roof("h100_sxm", 2048.0)]),
    "rooflines": lambda: roofline_figure(
        [roof(g, m) for g, m in zip(GPUS, (2048.0, 64.0, 1.0), strict=True)]
    ),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {name: make() for name, make in FIGURES.items()}


def test_the_bytes_do_not_depend_on_the_users_settings_or_the_process(tmp_path: Path) -> None:
    code = (
        "import sys; import matplotlib; from simulator.figures.style import *;from"
        " simulator.figures.waterfall import *;matplotlib.rcParams.update({'font.size': 30,"
        " 'axes.grid': False, 'svg.hashsalt': 'other'});panel = Steps('x', ['a', 'b'], [0.9, 1.1],"
        " 1.3, 1.2, 1.4); figure = waterfall_figure([panel]);[save_figure(figure, path) for path in"
        " sys.argv[1:]]"
    )
    here = [tmp_path / f"here{suffix}" for suffix in (".svg", ".pdf", ".png")]
    there = [tmp_path / f"there{suffix}" for suffix in (".svg", ".pdf", ".png")]
    figure = waterfall_figure([Steps("x", ["a", "b"], [0.9, 1.1], 1.3, 1.2, 1.4)])
    for path in here:
        style.save_figure(figure, path)
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, *map(str, there)], check=True, cwd=root)
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in there]


@pytest.mark.parametrize("name", list(FIGURES))
def test_figures_print_without_clashes(name: str, drawn: dict[str, Figure]) -> None:
    check_print(drawn[name])


SIZES = [("3.25in", 9.0), ("84mm", 7.0), ("5.5in", 9.0), ("12cm", 8.0)]


@pytest.mark.parametrize(("width", "font"), SIZES)
@pytest.mark.parametrize(
    "name", ["few dots", "curves", "curves, one device", "waterfalls", "rooflines"]
)
def test_figures_of_a_stated_width_and_font_print_without_clashes(
    name: str, width: str, font: float
) -> None:
    with style.PaperSize.read(width, font).applied():
        if name == "few dots":
            check_print(speedups(FOUR, [0.3], GPUS, "prefill", batch=[1, 64]))
        else:
            check_print(FIGURES[name]())


@pytest.mark.quick
def test_a_figure_that_would_be_higher_than_a_page_is_refused() -> None:
    with style.PaperSize.read("3.25in", 9.0).applied(), pytest.raises(InputError, match="height"):
        FIGURES["dots"]()


@pytest.mark.quick
def test_files_have_the_stated_width_and_font_embedded_fonts_and_a_palette(tmp_path: Path) -> None:
    with style.PaperSize.read("5.5in", 9.0).applied():
        figure = waterfall_figure([steps("h100_sxm", [0.99, 0.9, 1.03, 0.97, 1.0, 0.95, 0.83])])
        for suffix in style.SUFFIXES:
            style.save_figure(figure, tmp_path / f"x{suffix}")
    pdf = (tmp_path / "x.pdf").read_bytes()
    page = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
    assert page is not None
    assert float(page[1]) == pytest.approx(5.5 * 72)
    streams = re.findall(rb"stream\n(.*?)\nendstream", pdf, re.DOTALL)
    text = pdf + b"".join(zlib.decompress(s) for s in streams if s[:1] == b"\x78")
    assert b"/FontFile2" in text  # TrueType programs
    assert b"/Type3" not in text
    assert b"CreationDate" not in text
    scale = re.search(rb"([\d.]+) 0 0 [\d.]+ 0 0 cm", text)
    fonts = {float(size) for size in re.findall(rb"/F\d+ ([\d.]+) Tf", text)}
    assert scale is not None
    # the label of the axis, and no text much smaller
    assert any(size * float(scale[1]) == pytest.approx(9.0, rel=1e-4) for size in fonts)
    assert min(fonts) * float(scale[1]) >= 0.85 * 9.0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size[0] == pytest.approx(5.5 * 300, abs=1)
        assert picture.mode == "P"  # a palette: a third of the bytes
        assert picture.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
    svg = (tmp_path / "x.svg").read_text()
    found = re.search(r'<svg [^>]*width="([\d.]+)pt"[^>]*viewBox="0 0 ([\d.]+)', svg)
    assert found is not None
    assert float(found[1]) == pytest.approx(5.5 * 72)
    assert float(found[2]) == pytest.approx(5.5 * 72 * 7 / 9)


SPEEDUP = "speedup llama-3.1-8b --hardware h100"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{SPEEDUP} --width 5.5 --figure x.pdf", "expected a length in in, cm, mm or pt"),
        (f"{SPEEDUP} --width aain --figure x.pdf", "expected a number"),
        (f"{SPEEDUP} --width 2in --font 9 --figure x.pdf", "expected 2.83in to 60in with a font"),
        (f"{SPEEDUP} --font 2 --figure x.pdf", "expected 4 to 40 points"),
        (f"{SPEEDUP} --width 5.5in", "--width: expected with --figure FILE"),
        ("paper --font 9", "--font: expected with --figure FILE"),
        ("compare llama-3.2-1b -o run --device cpu --font 2", "expected 4 to 40 points"),
        ("validate a100 a100_sxm/gemm/trtllm --font 9", "expected with --markdown FILE"),
    ],
)
def test_a_size_that_cannot_be_drawn_is_refused(line: str, reason: str, cli: Any) -> None:
    assert reason in cli.refused(line)


class EndedReader(io.StringIO):
    """Standard output into a program that has ended, such as head."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.quick
def test_a_figure_is_written_although_the_reader_of_the_output_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.svg"
    monkeypatch.setattr(sys, "stdout", EndedReader())
    assert run([*SPEEDUP.split(), "--family", "depth", "--figure", str(file)]) == 1
    assert "<svg" in file.read_text()


def test_of_many_rows_a_frontier_draws_few_states_how_many_and_has_all_of_the_frontier() -> None:
    model = load_model("llama-2-7b")
    table = load_quality().of_model(model.name)
    (front,), _ = fronts(model, [load_hardware("a100")], table, choose_axis(table))
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=(20_000, 2)))
    points = tuple(
        replace(p, loss=p.loss * a, speedup=b, speedup_lower=0.9 * b, speedup_upper=1.1 * b)
        for p, (a, b) in zip(front.points * 10_000, noise.tolist())
    )
    figure = fronts_of([replace(front, points=points)])
    assert re.fullmatch(r"5\d\d of 20,000 points drawn, with all on a frontier", title(figure))
    shown = np.concatenate([line.get_xydata() for line in figure.axes[0].lines])
    best = frontier([p.loss for p in points], [p.speedup for p in points])
    for i in np.flatnonzero(best):
        at = 100.0 * points[i].loss, points[i].speedup
        assert np.isclose(shown, at, rtol=1e-9).all(axis=1).any()


def title(figure: Figure) -> str:
    return str(figure.get_suptitle())


@pytest.mark.quick
def test_every_family_has_a_look_of_its_own() -> None:
    assert set(style.STYLES) == set(FAMILIES)
    assert len({(a.marker, a.color, a.hollow) for a in style.STYLES.values()}) == len(style.STYLES)
    # apart in grey print too
    assert len({(a.marker, a.hollow) for a in style.STYLES.values()}) == len(style.STYLES)
    for name, family in FAMILIES.items():
        if name not in ("token", "kv_cache", "sparse_attention"):
            assert style.style_of(name).hollow == family.dynamic, name
    assert style.in_order(reversed(list(style.STYLES))) == list(style.STYLES)


def roofs(ax: Any) -> tuple[Any, Any]:
    """The lines of a roof: at the datasheet's rate, and at the highest clock (None where there is
    none)."""
    lines = [
        line for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata()) == 3
    ]
    return lines[0], lines[1] if len(lines) > 1 else None


@pytest.mark.quick
def test_no_point_lies_above_the_roof_of_the_highest_clock() -> None:
    fast, slow = (roof("x", 2048.0, headroom=h) for h in (1.25, 1.0))
    # above the datasheet's rate, below that of the highest clock
    points = np.asarray(fast.achieved_flop_per_s) * 1.5
    figure = roofline_figure([replace(fast, achieved_flop_per_s=points), slow])
    datasheet, highest = roofs(figure.axes[0])
    assert (
        datasheet.get_ydata().max()
        == 989.4
        < points.max() / 1e12
        < highest.get_ydata().max()
        == 1.25 * 989.4
    )
    assert highest.get_linestyle() == "--" != datasheet.get_linestyle()
    assert "989.4 to 1,237 TFLOP/s" in figure.axes[0].get_title()
    assert roofs(figure.axes[1])[1] is None  # a device whose datasheet is at its highest clock
    assert [t.get_text() for t in figure.legends[0].texts][-2:] == ["datasheet", "highest clock"]


@pytest.mark.parametrize("name", ["a100_sxm_80gb", "h100_sxm", "rtx_4090"])
def test_no_measured_gemm_lies_above_the_highest_line(
    name: str, request: pytest.FixtureRequest
) -> None:
    hw = load_hardware(name)
    if name == "rtx_4090":
        rows, _ = load_rows(
            [str(request.getfixturevalue("shared_data") / "rtx4090_gemm.csv")], screened=False
        )
        table = gemms_of_format(rows, "bf16", "")
    else:
        table = shipped_gemms(hw, "bf16")
    work = 2 * table.m * table.n * table.k
    moved = 2 * (table.m * table.n + table.n * table.k + table.m * table.k)
    highest = hw.peak_flop_per_s("bf16") * hw.clock_headroom
    floor_s = np.maximum(work / highest, moved / hw.bandwidth_bytes_per_s)
    assert (table.seconds >= floor_s).all()


@pytest.mark.quick
def test_a_waterfall_ends_at_the_product_of_its_factors() -> None:
    factors = [0.99, 0.9, 1.03, 0.97, 1.0, 0.95, 0.83]
    (ax,) = waterfall_figure([steps("x", factors)]).axes
    last = ax.patches[-1]
    assert last.get_x() + last.get_width() == pytest.approx(1.333 * np.prod(factors))


def test_titles_tell_all_devices_engines_models_and_families_apart() -> None:
    devices, engines = (
        map(style.device_title, list_hardware()),
        map(style.engine_title, list_engines()),
    )
    for titles in map(
        list, (devices, engines, map(model_title, list_models()), map(style.label, FAMILIES))
    ):
        assert len(set(titles)) == len(titles)
        assert not any("_" in t for t in titles if "Nemotron" not in t)
    for name in list_models():
        # published as "...-hf"
        assert load_model(model_title(name)).name == name or name.startswith("llama-2")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("width mlp=0.3 + shortgpt 0.25", "Width mlp=0.3 + ShortGPT 0.25"),
        ("sparse_attention at 50 %", "Sparse attention at 50 %"),
        ("depth+width", "Depth + Width"),
        ("mine + depth 0.25", "mine + depth 0.25"),
    ],
)
def test_a_pruning_has_the_titles_of_families_and_methods(text: str, title: str) -> None:
    assert style.label(text) == title


@pytest.mark.quick
def test_a_device_has_the_words_that_people_say() -> None:
    titles = {
        "a100_sxm_80gb": "A100 80GB SXM",
        "rtx_4090": "RTX 4090",
        "rtx_4090@vllm": "RTX 4090 (vLLM kernels)",
    }
    titles |= {"gpu of mine": "gpu of mine"}
    assert {name: style.device_title(name) for name in titles} == titles
