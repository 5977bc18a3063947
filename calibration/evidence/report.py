"""Markdown: the report of a validation with its figures, and every table of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.evidence.validate import Report, summary
from simulator.display import markdown_text
from simulator.files.write import check_target, write_whole

ENOUGH_TO_DRAW = 10  # rows that an operator needs for a figure
ERRORS = ("mape", "median", "p95", "bias")
ERROR_TITLES = ("MAPE %", "median %", "p95 %", "bias %")


def percent(value: Any, digits: int = 1) -> str:
    """Return a fraction in percent for a table; a dash for none."""
    return "-" if value is None or value != value else f"{100 * value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table; the columns ``left`` align left, the others right."""
    rule = ["---" if i in left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


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


def markdown(report: Report, figures: Mapping[str, str] | None = None, title: str = "") -> str:
    """Return the report as Markdown; ``figures``: part ("gemm bf16") -> address of its image."""

    def errors(values: Mapping[str, Any]) -> list[str]:
        return [percent(values.get(name), 2) for name in ERRORS]

    data = summary(report)
    about = markdown_text(f"Measured on {report.device}; software: {report.software}.")
    lines = [f"# {markdown_text(title or f'Accuracy of {report.hardware}')}", ""]
    lines += [f"{about} Errors are predicted over measured time less one, in percent.", ""]
    lines += [_accuracy_table(data["parts"]), ""]
    if any(p["fitted_on_these_rows"] for p in data["parts"]):
        lines += ["\\* fitted on these rows; the errors on held-out shapes are below.", ""]
    if data["skipped"]:
        lines += [f"- {count} rows excluded: {markdown_text(reason)}" for reason, count in data["skipped"].items()] + [
            ""
        ]
    if held_out := data["held_out_when_fitted"]:
        rows = [[name, *errors(values)] for name, values in held_out.items()]
        lines += ["## Held-out shapes of the fit", "", table(["section", *ERROR_TITLES], rows), ""]
    covered = f"coverage of the {100 * report.level:.3g} % interval, %"
    for p in data["parts"]:
        name = f"{p['operator']} {p['dtype']}"
        lines += [f"## {name}", ""]
        if "by_m" in p:
            rows = [[m, f"{v['rows']:,}", *errors(v)] for m, v in p["by_m"].items()]
            lines += [table(["m", "rows", *ERROR_TITLES], rows), ""]
        rows = [[c["bottleneck"], f"{c['rows']:,}", percent(c["coverage"]), percent(c["width"])] for c in p["coverage"]]
        lines += [table(["bottleneck", "rows", covered, "half-width %"], rows), ""]
        if address := (figures or {}).get(name):
            lines += [f"![{name}: predicted]({address})", "", "Predicted against measured time, and their ratio.", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_markdown(report: Report, path: str | Path, title: str = "") -> tuple[Path, ...]:
    """Write FILE.md and the figures of its larger parts as PNG files in the same folder; return all files, the text
    last."""
    from simulator.figures.measured import Cloud, scatter_figure
    from simulator.figures.style import save_figure

    target, written = check_target(path), dict[str, Path]()
    for part in report.parts:
        if len(part) >= ENOUGH_TO_DRAW:
            written[part.name] = target.with_name(f"{target.stem}_{part.name.replace(' ', '_')}_predicted.png")
            cloud = Cloud(part.name, part.measured_s, part.predicted_s, what="rows")
            save_figure(scatter_figure([cloud]), written[part.name])
    write_whole(target, markdown(report, {name: file.name for name, file in written.items()}, title).encode())
    return (*written.values(), target)
