"""From transcribed quality figures of papers to the quality table that ships: families and models named as here, every refusal counted.

``python -m calibration.judge.published_quality pruning_quality.csv`` writes ``simulator/predict/published/published.csv`` and the note beside it. The
input has the columns method, family, model, sparsity, metric, dense, pruned, source, note.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from simulator.files.write import write_whole
from simulator.models.library import list_models
from simulator.predict.quality import FOLDER, QualityRow, QualityTable, read_quality, relative_loss, table_text

MODELS: Mapping[str, str] = {"mistral-7b": "mistral-7b-v0.1"}
"""Names that are not those of this project once in lower case: Mistral-7B with a perplexity of 5.25 on WikiText2 is its version 0.1."""

FAMILY: Mapping[str, str] = {
    "2:4": "semi_structured",
    "width": "width",
    "depth": "depth",
    "unstructured": "unstructured",
    "low-rank": "low_rank",
    "dynamic depth": "dynamic_depth",
    "sparse attention": "sparse_attention",
}

METRICS: Mapping[str, tuple[str, bool]] = {
    "WikiText2 ppl (seq 2048)": ("WikiText2 perplexity, seq 2048", False),
    "WikiText2 ppl (seq 4096)": ("WikiText2 perplexity, seq 4096", False),
    "WikiText2 ppl (seq 128)": ("WikiText2 perplexity, seq 128", False),
    "WikiText2 ppl (seq 128 protocol)": ("WikiText2 perplexity, seq 128", False),
    "WikiText2 ppl": ("WikiText2 perplexity", False),
    "C4 ppl": ("C4 perplexity", False),
    "PTB ppl (seq 128)": ("PTB perplexity, seq 128", False),
    "PTB ppl (seq 2048)": ("PTB perplexity, seq 2048", False),
    "ppl (PG19)": ("PG19 perplexity", False),
    "zero-shot avg acc % (PIQA,Wino,HellaS,ARC-e,ARC-c)": ("zero-shot accuracy, mean of 5 tasks (%)", True),
    "zero-shot mean acc %": ("zero-shot accuracy, mean (%)", True),
    "zero-shot avg acc % (7 tasks)": ("zero-shot accuracy, mean of 7 tasks (%)", True),
    "avg acc % (7 tasks)": ("accuracy, mean of 7 tasks (%)", True),
    "avg acc fraction (6 tasks)": ("accuracy, mean of 6 tasks", True),
    "avg of 13 benchmarks %": ("score, mean of 13 benchmarks (%)", True),
    "MMLU acc %": ("MMLU accuracy (%)", True),
}
"""Metric as transcribed -> as named here, and whether higher is better."""

SLICED = (("residual_projections", True),)
"""SliceGPT turns the residual stream twice a layer, which costs two GEMMs."""


def refusal(cells: Mapping[str, str]) -> str:
    """Why a transcribed row is not used; empty where it is.

    >>> refusal({"dense": "", "family": "depth", "sparsity": "0.3", "model": "m", "metric": "C4 ppl", "pruned": "1"})
    'no dense value in the source'
    """
    if not cells["dense"]:
        return "no dense value in the source"
    if cells["family"] == "4:8":
        return "4:8 pattern: sparse tensor cores take 2:4, so no family stands for it"
    if cells["family"] not in FAMILY:
        return f"{cells['family']}: layers replaced by a trained one are not one family"
    try:
        fraction = float(cells["sparsity"])
    except ValueError:
        return "the fraction removed is not a number (it depends on the pattern found)"
    if not 0.0 < fraction < 1.0 or float(cells["dense"]) <= 0.0 or float(cells["pruned"]) < 0.0:
        return "a value out of range"
    return "" if cells["metric"] in METRICS else "a metric without a direction"


def clean_row(cells: Mapping[str, str]) -> QualityRow:
    """One usable transcribed row in the schema of quality tables."""
    method, source = cells["method"], cells["source"]
    name = cells["model"].lower().replace(" ", "-").replace("(", "").replace(")", "")
    across = method.startswith("SliceGPT") or "Channel" in method
    family = "width_cross" if across and cells["family"] == "width" else FAMILY[cells["family"]]
    metric, higher = METRICS[cells["metric"]]
    return QualityRow(
        method,
        family,
        MODELS.get(name, name),
        float(cells["sparsity"]),
        metric,
        higher,
        float(cells["dense"]),
        float(cells["pruned"]),
        protocol(method, source, cells["note"]),
        source,
        SLICED if method.startswith("SliceGPT") else (),
        cells["note"],
    )


def protocol(method: str, source: str, note: str) -> str:
    """Paper, table, calibration data and fine-tuning: what must be equal for two numbers to be comparable.

    >>> protocol("SliceGPT+RFT", "SliceGPT (arXiv 2401.15024) Table 9", "WikiText2 calibration + RFT")
    'SliceGPT Table 9, WikiText2 calibration, fine-tuned'
    """
    paper, _, rest = source.partition(" (arXiv ")
    table = rest.partition(") ")[2].split(" (")[0] if rest else ""
    where = f"{paper} {table}".strip() if rest else source
    tuned = any(mark in method for mark in ("+RFT", "+LoRA", "+tune", "MaskLLM")) or method == "SVD-LLM"
    on = [data for data in ("WikiText2", "Alpaca") if f"{data} calibration" in note or f"calibrated on {data}" in note]
    calibration = f", {on[0]} calibration" if on else ""
    kind = "mask learned" if "MaskLLM" in method else "fine-tuned" if tuned else "no fine-tuning"
    return f"{where}{calibration}, {kind}"


def clean(path: Path) -> tuple[QualityTable, Counter[str]]:
    """The usable rows of a transcribed table and how many were refused for what."""
    refused: Counter[str] = Counter()
    rows: dict[QualityRow, None] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            why = refusal(cells)
            row = None if why else clean_row(cells)
            if row in rows:
                why = "the same row twice"
            if why:
                refused[why] += 1
            elif row is not None:
                rows[row] = None
    return read_quality(table_text(rows), path.name), refused


def spot_checks(rows: Sequence[QualityRow]) -> tuple[list[str], list[str]]:
    """Where a series is not monotone in sparsity, and where pruning is reported to do good: findings, not refusals."""
    series: dict[tuple[object, ...], list[QualityRow]] = defaultdict(list)
    for r in rows:
        series[r.method, r.family, r.model, r.axis].append(r)
    uneven = []
    for group in series.values():
        group.sort(key=lambda r: r.sparsity)
        uneven += [
            f"{b.method}, {b.model}, {b.axis}: {a.pruned:g} at {a.sparsity:g}, {b.pruned:g} at {b.sparsity:g}"
            for a, b in itertools.pairwise(group)
            if b.relative_loss < a.relative_loss
        ]
    gains = [
        f"{r.method}, {r.model}, {r.axis}: {r.dense:g} -> {r.pruned:g} at {r.sparsity:g}"
        for r in rows
        if r.relative_loss < 0
    ]
    return uneven, gains


def agreement(rows: Sequence[QualityRow]) -> list[str]:
    """The same method, model, sparsity and dense value in two papers: where the pruned values differ, and how many agree to 0.1 %."""
    seen: dict[tuple[object, ...], QualityRow] = {}
    out, same = [], 0
    for r in rows:
        key = (r.method, r.model, r.sparsity, r.dense, r.higher_is_better)
        first = seen.setdefault(key, r)
        if r.source.split()[0] == first.source.split()[0] or not r.protocol.endswith(
            first.protocol.rpartition(", ")[2]
        ):
            continue
        apart = abs(relative_loss(first.pruned, r.pruned, True))
        if apart < 1e-3:
            same += 1
        else:
            values = " and ".join(f"{x.pruned:g} ({x.source})" for x in (first, r))
            out.append(f"{r.method}, {r.model}, {r.sparsity:g}: {values}, {100 * apart:.2f} % apart")
    return [f"{same} pairs agree to 0.1 %", *out]


def note_text(table: QualityTable, refused: Counter[str], source: str) -> str:
    """The note that ships beside the table."""
    uneven, gains = spot_checks(table.rows)
    known = sum(r.model in list_models() for r in table.rows)
    parts = [
        "# Where published.csv is from\n",
        f"Facts transcribed from papers and their repositories ({source}), each row with its source; some were read from",
        "figures or by OCR.",
        f"Made by `python -m calibration.judge.published_quality {source}`.\n",
        f"{len(table)} rows kept ({known} of models whose configuration ships), {sum(refused.values())} refused:\n",
        *(f"- {count}: {why}" for why, count in refused.most_common()),
        "\nWithin one model, metric and protocol the dense value is one and the same (the reader refuses a table where it is not).",
        "SliceGPT and LLM-Pruner's channel mode remove hidden features, so they count as width_cross; SliceGPT's two residual",
        "projections are kept as an option of the family. The fraction removed is the source's own: hidden features, layers,",
        "parameters or weight memory.\n",
        f"Not monotone in sparsity ({len(uneven)}):\n",
        *(f"- {line}" for line in uneven),
        f"\nReported better than dense ({len(gains)}):\n",
        *(f"- {line}" for line in gains),
        "\nThe same result in two papers:\n",
        *(f"- {line}" for line in agreement(table.rows)),
    ]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the table and its note."""
    path = Path(arguments[0])
    table, refused = clean(path)
    write_whole(FOLDER / "published.csv", table_text(table.rows).encode())
    write_whole(FOLDER / "PROVENANCE.md", note_text(table, refused, path.name).encode())
    print(f"{len(table)} rows kept, {sum(refused.values())} refused: {dict(refused)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
