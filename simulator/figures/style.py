"""Define the look of figures: style sheet, page widths, families, titles of devices and engines,
and files.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can
distinguish. There are more families than colours, so marker and fill identify a family too: static
families have filled markers and solid lines, dynamic families hollow markers and dashed lines. Both
forms of an idea share a colour.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simulator.engines.engine import list_engines, load_engine, split
from simulator.errors import InputError
from simulator.files.write import check_target, write_whole
from simulator.hardware.library import list_hardware, load_hardware
from simulator.pruning._titles import TITLES
from simulator.units import parse_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")
COLUMN_IN, PAGE_IN = 3.35, 7.0  # widths of one and of both columns of a paper, inches
FONT_PT = 7.0  # size of the labels of axes in the style sheet; other texts are 0.85 to 1.07 of it
LEAST_IN = 2.2  # width of the narrowest figure with the font of the style sheet, inches
LENGTHS_IN = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}  # pt as in TeX

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, INK, PALE_INK = "#8A8A8A", "#444444", "#5A5A5A"


Look = dict[str, Any]
"""Arguments of a mark, a line or a text."""


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    line: str = "-"
    hollow: bool = False
    label: str = ""

    def marks(self, **other: Any) -> Look:
        face = "white" if self.hollow else self.color
        marks = {"color": self.color, "marker": self.marker, "linestyle": self.line}
        return marks | {"markerfacecolor": face, "markeredgecolor": self.color} | other


# in the order of legends: static families first
STYLES: MappingProxyType[str, Style] = MappingProxyType(
    {
        "depth": Style(BLUE, "o", label="Depth"),
        "width": Style(VERMILLION, "s", label="Width"),
        "width_cross": Style(ORANGE, "D", label="Width, cross-layer"),
        "semi_structured": Style(GREEN, "^", label="2:4"),
        "low_rank": Style(PURPLE, "P", label="Low rank"),
        "unstructured": Style(GREY, "X", ":", label="Unstructured"),
        "dynamic_depth": Style(BLUE, "o", "--", True, label="Dynamic depth"),
        "dynamic_width": Style(VERMILLION, "s", "--", True, label="Dynamic width"),
        "sparse_attention": Style(GREEN, "v", "--", True, label="Sparse attention"),
        "token": Style(BLACK, "d", "--", True, label="Token"),
        "kv_cache": Style(SKY, "h", "-", label="KV cache"),
        "experts": Style(PURPLE, "*", "-.", label="Experts"),
    }
)
DENSE = Style(BLACK, "o", "--", True, label="dense")  # the dense model where it has a curve

COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)


def style_of(name: str) -> Style:
    """Return the style of a family; other names share one."""
    return STYLES.get(name, STYLES["depth"])


def label(name: str) -> str:
    """Return a pruning with the titles of its families and methods: "Width mlp=0.3 + Depth 0.25";
    another name is returned unchanged."""
    titles = {**TITLES, **{family: style.label for family, style in STYLES.items()}}
    steps = [step.strip().partition(" ") for step in name.split("+")]
    if not all(first in titles for first, _, _ in steps):
        return name
    return " + ".join(f"{titles[first]}{blank}{rest}" for first, blank, rest in steps)


def in_order(names: Any) -> list[str]:
    """Return names without repeats: families in the order of legends, then the other names in the
    given order."""
    once = list(dict.fromkeys(names))
    known = list(STYLES)
    return sorted(once, key=lambda name: known.index(name) if name in STYLES else len(known))


def styles_of(families: Mapping[str, str]) -> dict[str, Style]:
    """Return styles of candidates, given the family of each ("": a method): the first candidate of
    a family has the family's style, others have colours and markers that no family has."""
    own: dict[str, Style | None] = {
        family: STYLES[family] for family in families.values() if family in STYLES
    }
    colors = {style.color for style in own.values() if style}
    used = {(style.color, style.marker) for style in STYLES.values()}
    free = [Style(c, m) for c, m in zip(COLORS * 3, "osD^vPXdh*<>p" * 2) if (c, m) not in used]
    others = cycle(sorted(free, key=lambda style: style.color in colors))
    return {name: own.pop(family, None) or next(others) for name, family in families.items()}


@lru_cache(maxsize=256)
def device_title(label: str) -> str:
    """Return the title of a device ("A100 80GB SXM") from the label of its profile: the words of
    the vendor's title that are in its name, and a software stack that was selected by name. An
    unknown label is its own title."""
    found = re.fullmatch(r"(?P<name>[^@ ]+)(?:@(?P<stack>\S+))?(?P<more>.*)", label)
    if found is None or found["name"] not in list_hardware():
        return label
    words = [re.sub(r"(SXM)\d", r"\1", word) for word in load_hardware(found["name"]).title.split()]
    named = [word for word in words if word.lower() in found["name"].split("_")]
    stack = f" ({engine_title(found['stack'])} kernels)" if found["stack"] else ""
    return f"{' '.join(named or words)}{stack}{found['more']}"


def engine_title(name: str) -> str:
    return load_engine(name).short_title or name if split(name)[0] in list_engines() else name


@dataclass(frozen=True)
class PaperSize:
    """Width of figures on paper, and font size of the labels of their axes.

    A figure is laid out in the font of the style sheet, and saved larger by ``scale``. Lines and
    markers grow with the texts.
    """

    width_in: float | None = None  # None: one or both columns of a paper, at the scale
    font_pt: float = FONT_PT

    @classmethod
    def read(cls, width: str | None, font: float | None) -> PaperSize:
        """Return the size that ``--width`` and ``--font`` state; InputError for one that cannot be
        read or drawn."""
        font = FONT_PT if font is None else font
        if not 4.0 <= font <= 40.0:
            raise InputError(f"--font {font:g}: expected 4 to 40 points")
        size = cls(None if width is None else _inches(width), font)
        least, most = LEAST_IN * size.scale, 60.0
        if size.width_in is not None and not least <= size.width_in <= most:
            limits = f"{math.ceil(100 * least) / 100:g}in to {most:g}in"
            raise InputError(f"--width {width}: expected {limits} with a font of {font:g} pt")
        return size

    @property
    def scale(self) -> float:
        return self.font_pt / FONT_PT

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give this size to the figures that are drawn and saved within the context."""
        token = _SIZE.set(self)
        try:
            yield
        finally:
            _SIZE.reset(token)


_USUAL = PaperSize()
_SIZE = ContextVar("paper size", default=_USUAL)


def paper_size() -> PaperSize:
    return _SIZE.get()


def _inches(text: str) -> float:
    number, unit = text.strip()[:-2], text.strip()[-2:]
    if unit not in LENGTHS_IN:
        raise InputError(f"--width {text}: expected a length in in, cm, mm or pt, such as 5.5in")
    try:
        return parse_number(number.strip()) * LENGTHS_IN[unit]
    except InputError as error:
        raise InputError(f"--width {text}: {error}") from None


@contextmanager
def paper_style() -> Iterator[None]:
    """Give figures the style sheet only, whatever the user's settings are. A character that the
    font lacks is a box, without a warning."""
    from matplotlib import style

    with warnings.catch_warnings(), style.context(["default", STYLE_FILE]):
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


DPI = 300
SUFFIXES = (".pdf", ".svg", ".png")
# no dates: the bytes must not change between runs
_METADATA = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}


def check_figure(path: str | Path) -> Path:
    """Return a path to which a figure can be written; InputError for another suffix or a bad
    folder."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in .pdf, .svg or .png")
    return check_target(path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, whole, in the format of its suffix; the same figure has the same bytes."""
    target = check_figure(path)
    suffix, scale = target.suffix.lower(), paper_size().scale
    with paper_style():
        made = {".pdf": _pdf, ".svg": _svg, ".png": _png}[suffix](figure, scale)
    write_whole(target, made)


def _pdf(figure: Figure, scale: float) -> bytes:
    """Return a file whose page and drawing are scaled, which ``savefig`` has no option for."""
    from matplotlib.backends import backend_pdf

    pdf: Any = backend_pdf
    out, usual = io.BytesIO(), figure.dpi
    file = pdf.PdfFile(out, metadata=_METADATA[".pdf"])
    width, height = figure.get_size_inches()
    figure.dpi = 72  # points
    file.newPage(scale * width, scale * height)
    file.output(scale, 0, 0, scale, 0, 0, pdf.Op.concat_matrix)
    page, dpi = pdf.RendererPdf(file, DPI, height, width), DPI * scale
    renderer = pdf.MixedModeRenderer(figure, width, height, dpi, page)
    figure.draw(renderer)
    renderer.finalize()
    file.finalize()
    file.close()
    figure.dpi = usual
    return out.getvalue()


def _svg(figure: Figure, scale: float) -> bytes:
    """Return a file whose width and height are scaled; its view box stays."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=_METADATA[".svg"])
    return re.sub(
        r'(?<= )(width|height)="([\d.]+)pt"',
        lambda found: f'{found[1]}="{scale * float(found[2]):.6g}pt"',
        out.getvalue(),
        count=0 if scale == 1.0 else 2,
    ).encode()


def _png(figure: Figure, scale: float) -> bytes:
    """Return a file with a palette instead of colours: a third of the bytes."""
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", metadata=_METADATA[".png"], dpi=DPI * scale)
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(
            256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        few.save(out, "png", dpi=(DPI, DPI))
    return out.getvalue()


def svg_text(figure: Figure) -> str:
    """Return a figure, whose layout is final, as an SVG element for a page."""
    out = io.StringIO()
    with paper_style():
        figure.set_layout_engine(None)  # else Matplotlib draws it once more
        figure.savefig(out, format="svg", metadata=_METADATA[".svg"])
    text = out.getvalue()
    return text[text.index("<svg") :]
