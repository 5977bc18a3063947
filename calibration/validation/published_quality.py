"""Convert transcribed quality figures of papers to the quality table that ships, and count the rejected rows.

``python -m calibration.validation.published_quality pruning_quality.csv`` writes
``simulator/predict/published/published.csv``; PROVENANCE.md in the same folder lists what was kept and rejected. The
input has the columns method, family, model, sparsity, metric, dense, pruned, source, note.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from simulator.files.write import write_whole
from simulator.predict.quality import FOLDER, QualityRow, QualityTable, read_quality, table_text

MODELS: Mapping[str, str] = {"mistral-7b": "mistral-7b-v0.1"}
"""Lower-case names that differ from the names of this project. Mistral-7B with a perplexity of 5.25 on WikiText2 is
version 0.1."""

FAMILY: Mapping[str, str] = {
    "2:4": "semi_structured",
    "width": "width",
    "depth": "depth",
    "unstructured": "unstructured",
    "low-rank": "low_rank",
    "dynamic depth": "dynamic_depth",
    "sparse attention": "sparse_attention",
}

PERPLEXITIES: Mapping[str, str] = {
    **{f"WikiText2 ppl (seq {n})": f"WikiText2 perplexity, seq {n}" for n in (128, 2048, 4096)},
    **{f"PTB ppl (seq {n})": f"PTB perplexity, seq {n}" for n in (128, 2048)},
    "WikiText2 ppl (seq 128 protocol)": "WikiText2 perplexity, seq 128",
    "WikiText2 ppl": "WikiText2 perplexity",
    "C4 ppl": "C4 perplexity",
    "ppl (PG19)": "PG19 perplexity",
}
SCORES: Mapping[str, str] = {
    "zero-shot avg acc % (PIQA,Wino,HellaS,ARC-e,ARC-c)": "zero-shot accuracy, mean of 5 tasks (%)",
    "zero-shot mean acc %": "zero-shot accuracy, mean (%)",
    "zero-shot avg acc % (7 tasks)": "zero-shot accuracy, mean of 7 tasks (%)",
    "avg acc % (7 tasks)": "accuracy, mean of 7 tasks (%)",
    "avg acc fraction (6 tasks)": "accuracy, mean of 6 tasks",
    "avg of 13 benchmarks %": "score, mean of 13 benchmarks (%)",
    "MMLU acc %": "MMLU accuracy (%)",
}
METRICS = {**PERPLEXITIES, **SCORES}
"""Metric as transcribed -> name in the quality table; higher is better for scores."""


def rejection(cells: Mapping[str, str]) -> str:
    """Return why a transcribed row is rejected; empty if it is not.

    >>> rejection({"dense": "", "family": "depth", "sparsity": "0.3", "model": "m", "metric": "C4 ppl", "pruned": "1"})
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
    """Return a usable transcribed row as a row of the quality table."""
    name = cells["model"].lower().replace(" ", "-").replace("(", "").replace(")", "")
    sliced, metric = cells["method"].startswith("SliceGPT"), cells["metric"]
    across = cells["family"] == "width" and (sliced or "Channel" in cells["method"])
    return QualityRow(
        method=cells["method"],
        family="width_cross" if across else FAMILY[cells["family"]],
        model=MODELS.get(name, name),
        sparsity=float(cells["sparsity"]),
        metric=METRICS[metric],
        higher_is_better=metric in SCORES,
        dense=float(cells["dense"]),
        pruned=float(cells["pruned"]),
        protocol=protocol(cells["method"], cells["source"], cells["note"]),
        source=cells["source"],
        options=(("residual_projections", True),) if sliced else (),  # two GEMMs per layer rotate the residual stream
        note=cells["note"],
    )


def protocol(method: str, source: str, note: str) -> str:
    """Return the facts that two comparable numbers share: paper, table, calibration data and fine-tuning.

    >>> protocol("SliceGPT+RFT", "SliceGPT (arXiv 2401.15024) Table 9", "WikiText2 calibration + RFT")
    'SliceGPT Table 9, WikiText2 calibration, fine-tuned'
    """
    paper, _, rest = source.partition(" (arXiv ")
    where = f"{paper} {rest.partition(') ')[2].split(' (')[0]}".strip() if rest else source
    tuned = any(mark in method for mark in ("+RFT", "+LoRA", "+tune")) or method == "SVD-LLM"
    on = [data for data in ("WikiText2", "Alpaca") if f"{data} calibration" in note or f"calibrated on {data}" in note]
    kind = "mask learned" if "MaskLLM" in method else "fine-tuned" if tuned else "no fine-tuning"
    return f"{where}{f', {on[0]} calibration' if on else ''}, {kind}"


def clean(path: Path) -> tuple[QualityTable, Counter[str]]:
    """Return the usable rows of a transcribed table, and the number of rejected rows by reason."""
    rejected: Counter[str] = Counter()
    rows: dict[QualityRow, None] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            if why := rejection(cells):
                rejected[why] += 1
            elif (row := clean_row(cells)) in rows:
                rejected["the same row twice"] += 1
            else:
                rows[row] = None
    return read_quality(table_text(rows), path.name), rejected


if __name__ == "__main__":
    kept, rejected_rows = clean(Path(sys.argv[1]))
    write_whole(FOLDER / "published.csv", table_text(kept.rows).encode())
    print(f"{len(kept)} rows kept, {sum(rejected_rows.values())} rejected: {dict(rejected_rows)}")
