"""A validation written down: Markdown with plots beside it, or one HTML file that holds them.

Use :func:`write_markdown` and :func:`write_html` with a :class:`calibration.validate.Report`; :func:`markdown` is the text alone, which
needs no matplotlib. Files are written whole, the figures first.
"""

from __future__ import annotations

import base64
import html as escape
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.judge.scores import summary
from calibration.judge.validate import Report
from simulator.files.write import check_target, write_whole

Row = Sequence[str]

ENOUGH_TO_DRAW = 10
"""Rows an operator needs for figures of its own."""

CAPTIONS: Mapping[str, str] = {
    "predicted": "Predicted against measured time; grey: what a datasheet roofline alone says.",
    "sizes": "Error over each size.",
    "residuals": "Mean signed error by size, in octaves: red where the prediction is too slow, blue where it is too fast.",
    "coverage": "Measured times inside their interval, by regime, and the interval's half width.",
}


def percent(value: Any, digits: int = 1) -> str:
    """A fraction in percent for a table; a dash where there is none.

    >>> percent(0.0423), percent(None)
    ('4.2', '-')
    """
    return "-" if value is None or value != value else f"{100 * value:.{digits}f}"


def table(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table, first column left, others right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    | --- | ---: |
    | x | 1 |
    """
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def accuracy_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """One line an operator: errors of the model beside the two baselines that need no fit, speedups, coverage."""
    header = [
        "operator",
        "rows",
        "MAPE %",
        "median %",
        "p95 %",
        "bias %",
        "roofline MAPE %",
        "0.8 bw + 3 us MAPE %",
        "speedup median / p95 %",
        "Spearman",
        "in 90 % interval",
    ]
    rows = []
    for p in parts:
        e, s = p["errors"], p["speedup"]
        name = (
            f"{p['operator']} {p['dtype']}"
            + ("" if p["status"] == "calibrated" else f" ({p['status']})")
            + (" *" if p["fitted_on_these_rows"] else "")
        )
        rows.append(
            [
                name,
                f"{p['rows']:,}",
                percent(e["mape"], 2),
                percent(e["median"], 2),
                percent(e["p95"]),
                percent(e["bias"], 2),
                percent(p["roofline"]["mape"]),
                percent(p["simple"]["mape"]),
                f"{percent(s.get('median'), 2)} / {percent(s.get('p95'))}",
                f"{s['spearman']:.3f}" if s.get("spearman", float("nan")) == s.get("spearman", float("nan")) else "-",
                f"{percent(p['coverage'][0]['coverage'])} %",
            ]
        )
    return table(header, rows)


def markdown(
    report: Report,
    figures: Mapping[str, Mapping[str, str]] | None = None,
    data: Mapping[str, Any] | None = None,
    title: str = "",
) -> str:
    """The report as Markdown.

    Parameters
    ----------
    report : Report
    figures : mapping, optional
        Part ("gemm bf16") -> name of a figure -> address of its image.
    data : mapping, optional
        ``summary(report)``, where it is at hand.
    title : str

    Returns
    -------
    str
    """
    data = data or summary(report)
    lines = [
        f"# {title or f'Accuracy of {report.hardware}'}",
        "",
        f"Measured on {report.device}; software: {report.software}. Errors are predicted over measured time less one, in percent.",
        "",
        accuracy_table(data["parts"]),
        "",
    ]
    if any(p["fitted_on_these_rows"] for p in data["parts"]):
        lines += ["\\* fitted on these very rows; below, what its folds say of shapes left out.", ""]
    if data["skipped"]:
        lines += [*(f"- {count} rows left out: {reason}" for reason, count in data["skipped"].items()), ""]
    if data["held_out_when_fitted"]:
        lines += ["## Unseen shapes, when it was fitted", ""]
        rows = [
            [name, *(percent(v.get(k), 2) for k in ("mape", "median", "p95", "bias"))]
            for name, v in data["held_out_when_fitted"].items()
        ]
        lines += [table(["section", "MAPE %", "median %", "p95 %", "bias %"], rows), ""]
    for p in data["parts"]:
        name = f"{p['operator']} {p['dtype']}"
        lines += [f"## {name}", ""]
        if "by_m" in p:
            rows = [
                [m, f"{v['rows']:,}", *(percent(v[k], 2) for k in ("mape", "median", "p95", "bias"))]
                for m, v in p["by_m"].items()
            ]
            lines += [table(["m", "rows", "MAPE %", "median %", "p95 %", "bias %"], rows), ""]
        rows = [[c["regime"], f"{c['rows']:,}", percent(c["coverage"]), percent(c["width"])] for c in p["coverage"]]
        lines += [
            table(["regime", "rows", f"inside the {100 * report.level:.3g} % interval, %", "half width %"], rows),
            "",
        ]
        for figure, address in (figures or {}).get(name, {}).items():
            lines += [f"![{name}: {figure}]({address})", "", CAPTIONS[figure], ""]
    return "\n".join(lines).rstrip() + "\n"


def write_markdown(report: Report, path: str | Path, title: str = "") -> tuple[Path, ...]:
    """Write FILE.md and its figures as PNG files beside it.

    Returns
    -------
    tuple of Path
        All files written, the text last.

    Raises
    ------
    InputError
        When the path is a folder or in one that does not exist.
    """
    from calibration.judge.report_figures import part_figures, png

    target = check_target(path)
    figures: dict[str, dict[str, str]] = {}
    written = []
    for part in (p for p in report.parts if len(p) >= ENOUGH_TO_DRAW):
        name = f"{part.operator} {part.dtype}"
        for figure, drawn in part_figures(part, report.level).items():
            file = target.with_name(f"{target.stem}_{name.replace(' ', '_')}_{figure}.png")
            write_whole(file, png(drawn))
            written.append(file)
            figures.setdefault(name, {})[figure] = file.name
    write_whole(target, markdown(report, figures, title=title).encode())
    return (*written, target)


def write_html(report: Report, path: str | Path, title: str = "") -> Path:
    """Write the report as one HTML file with its figures inside; it loads nothing from elsewhere."""
    from calibration.judge.report_figures import part_figures, png

    target = check_target(path)
    images: dict[str, bytes] = {}
    figures: dict[str, dict[str, str]] = {}
    for part in (p for p in report.parts if len(p) >= ENOUGH_TO_DRAW):
        name = f"{part.operator} {part.dtype}"
        for figure, drawn in part_figures(part, report.level).items():
            key = f"image-{len(images)}"
            images[key] = png(drawn)
            figures.setdefault(name, {})[figure] = key
    text = markdown(report, figures, title=title)
    write_whole(target, html(text, images).encode())
    return target


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;font-size:13px}"
    "th,td{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}"
    "img{max-width:100%;display:block}h1,h2{line-height:1.2}"
)


def html(text: str, images: Mapping[str, bytes]) -> str:
    """The Markdown this module writes (headings, tables, lists, images, paragraphs) as one HTML page.

    >>> "<h1>A &lt;b&gt;</h1>" in html("# A <b>", {})
    True
    """
    out: list[str] = []
    rows: list[str] = []

    def close() -> None:
        if rows:
            out.append("<table>" + "".join(rows) + "</table>")
            rows.clear()

    for line in text.splitlines():
        if line.startswith("|"):
            if not set(line) <= set("|-: "):
                tag = "td" if rows else "th"
                cells = [escape.escape(cell.strip()) for cell in line.strip("|").split("|")]
                rows.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
            continue
        close()
        if match := re.fullmatch(r"!\[(.*)\]\((.*)\)", line):
            data = base64.b64encode(images[match[2]]).decode()
            out.append(f'<img alt="{escape.escape(match[1])}" src="data:image/png;base64,{data}">')
        elif match := re.fullmatch(r"(#+) (.*)", line):
            out.append(f"<h{len(match[1])}>{escape.escape(match[2])}</h{len(match[1])}>")
        elif line.startswith("- "):
            out.append(f"<ul><li>{escape.escape(line[2:])}</li></ul>")
        elif line:
            out.append(f"<p>{escape.escape(line.removeprefix(chr(92)))}</p>")
    close()
    first = text.splitlines()[0].lstrip("# ")
    head = f'<meta charset="utf-8"><title>{escape.escape(first)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(out)}</html>\n'
