"""Write a validation as Markdown with plots in separate files, or as one HTML file that contains them.

Use :func:`write_markdown` and :func:`write_html` with a :class:`calibration.validation.validate.Report`;
:func:`markdown` returns only the text, without matplotlib. Files are written whole, the figures first.
:func:`table` and :func:`percent` format every Markdown table of the project.
"""

from __future__ import annotations

import base64
import html as escape
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.validation.scores import summary
from calibration.validation.validate import Report
from simulator.display import markdown_text
from simulator.files.write import check_target, write_whole

ENOUGH_TO_DRAW = 10
"""Rows that an operator needs for separate figures."""

ERROR_TITLES = ("MAPE %", "median %", "p95 %", "bias %")

CAPTIONS: Mapping[str, str] = {
    "predicted": "Predicted against measured time; grey: datasheet roofline.",
    "sizes": "Error over each size.",
    "residuals": "Mean signed error by size, in octaves: red where the prediction is too slow, "
    "blue where it is too fast.",
    "coverage": "Coverage of the intervals by bottleneck, and their half-width.",
}


def percent(value: Any, digits: int = 1) -> str:
    """Return a fraction in percent for a table; a dash for none.

    >>> percent(0.0423), percent(None)
    ('4.2', '-')
    """
    return "-" if value is None or value != value else f"{100 * value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table; the columns ``left`` align left, the others right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    | --- | ---: |
    | x | 1 |
    """
    rule = ["---" if i in left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _errors(values: Mapping[str, Any]) -> list[str]:
    return [percent(values.get(name), 2) for name in ("mape", "median", "p95", "bias")]


def _accuracy_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per operator: errors of the model and of two baselines without a fit, speedups, coverage."""
    header = ["operator", "rows", *ERROR_TITLES, "roofline MAPE %", "0.8 bw + 3 us MAPE %"]
    header += ["speedup median / p95 %", "Spearman", "coverage"]
    rows = []
    for p in parts:
        e, s = p["errors"], p["speedup"]
        status = "" if p["status"] == "calibrated" else f" ({p['status']})"
        rank = s.get("spearman")
        line = [f"{p['operator']} {p['dtype']}{status}" + (" *" if p["fitted_on_these_rows"] else ""), f"{p['rows']:,}"]
        line += [percent(e["mape"], 2), percent(e["median"], 2), percent(e["p95"]), percent(e["bias"], 2)]
        line += [percent(p["roofline"]["mape"]), percent(p["simple"]["mape"])]
        line.append(f"{percent(s.get('median'), 2)} / {percent(s.get('p95'))}")
        line.append("-" if rank is None or rank != rank else f"{rank:.3f}")
        rows.append([*line, f"{percent(p['coverage'][0]['coverage'])} %"])
    return table(header, rows)


def markdown(report: Report, figures: Mapping[str, Mapping[str, str]] | None = None, title: str = "") -> str:
    """Return the report as Markdown; ``figures``: part ("gemm bf16") -> name of a figure -> address of its image."""
    data = summary(report)
    about = markdown_text(f"Measured on {report.device}; software: {report.software}.")
    lines = [f"# {markdown_text(title or f'Accuracy of {report.hardware}')}", ""]
    lines += [f"{about} Errors are predicted over measured time less one, in percent.", ""]
    lines += [_accuracy_table(data["parts"]), ""]
    if any(p["fitted_on_these_rows"] for p in data["parts"]):
        lines += ["\\* fitted on these rows; the errors on held-out shapes are below.", ""]
    if data["skipped"]:
        lines += [
            *(f"- {count} rows excluded: {markdown_text(reason)}" for reason, count in data["skipped"].items()),
            "",
        ]
    if held_out := data["held_out_when_fitted"]:
        rows = [[name, *_errors(values)] for name, values in held_out.items()]
        lines += ["## Held-out shapes of the fit", "", table(["section", *ERROR_TITLES], rows), ""]
    covered = f"coverage of the {100 * report.level:.3g} % interval, %"
    for p in data["parts"]:
        name = f"{p['operator']} {p['dtype']}"
        lines += [f"## {name}", ""]
        if "by_m" in p:
            rows = [[m, f"{v['rows']:,}", *_errors(v)] for m, v in p["by_m"].items()]
            lines += [table(["m", "rows", *ERROR_TITLES], rows), ""]
        rows = [[c["bottleneck"], f"{c['rows']:,}", percent(c["coverage"]), percent(c["width"])] for c in p["coverage"]]
        lines += [table(["bottleneck", "rows", covered, "half-width %"], rows), ""]
        for figure, address in (figures or {}).get(name, {}).items():
            lines += [f"![{name}: {figure}]({address})", "", CAPTIONS[figure], ""]
    return "\n".join(lines).rstrip() + "\n"


def _with_figures(report: Report, title: str, place: Callable[[str, bytes], str]) -> str:
    """Return the report with figures of its larger parts; ``place`` stores a PNG by name and returns its address."""
    from calibration.validation.report_figures import part_figures, png

    addresses = {
        part.name: {
            name: place(f"{part.name.replace(' ', '_')}_{name}", png(drawn))
            for name, drawn in part_figures(part, report.level).items()
        }
        for part in report.parts
        if len(part) >= ENOUGH_TO_DRAW
    }
    return markdown(report, addresses, title)


def write_markdown(report: Report, path: str | Path, title: str = "") -> tuple[Path, ...]:
    """Write FILE.md and its figures as PNG files in the same folder; return all files, the text last."""
    target = check_target(path)
    written = []

    def store(name: str, image: bytes) -> str:
        written.append(target.with_name(f"{target.stem}_{name}.png"))
        write_whole(written[-1], image)
        return written[-1].name

    write_whole(target, _with_figures(report, title, store).encode())
    return (*written, target)


def write_html(report: Report, path: str | Path, title: str = "") -> Path:
    """Write the report as one HTML file that contains its figures and loads no other file."""
    target = check_target(path)

    def embed(_: str, image: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(image).decode()}"

    write_whole(target, html(_with_figures(report, title, embed)).encode())
    return target


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;font-size:13px}"
    "th,td{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}"
    "img{max-width:100%;display:block}h1,h2{line-height:1.2}"
)


def html(text: str) -> str:
    """Return the Markdown of this module (headings, tables, lists, images, paragraphs) as one HTML page.

    >>> "<h1>A &lt;b&gt; &amp; c</h1>" in html("# A <b> &#38; c")
    True
    """

    def shown(part: str) -> str:
        return escape.escape(escape.unescape(part))

    out: list[str] = []
    rows: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            if not set(line) <= set("|-: "):
                tag = "td" if rows else "th"
                cells = [shown(cell.strip()) for cell in line.strip("|").split("|")]
                rows.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
            continue
        if rows:
            out.append("<table>" + "".join(rows) + "</table>")
            rows = []
        if match := re.fullmatch(r"!\[(.*)\]\((.*)\)", line):
            out.append(f'<img alt="{shown(match[1])}" src="{shown(match[2])}">')
        elif match := re.fullmatch(r"(#+) (.*)", line):
            out.append(f"<h{len(match[1])}>{shown(match[2])}</h{len(match[1])}>")
        elif line.startswith("- "):
            out.append(f"<ul><li>{shown(line[2:])}</li></ul>")
        elif line:
            out.append(f"<p>{shown(line.removeprefix(chr(92)))}</p>")
    first = text.splitlines()[0].lstrip("# ")
    head = f'<meta charset="utf-8"><title>{shown(first)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(out)}</html>\n'
