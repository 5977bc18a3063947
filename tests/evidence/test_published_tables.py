"""Published measurements of whole models: every row is well formed, names its source, and can be
lowered and pruned."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest
import yaml

from calibration.evidence.measurements import PUBLISHED, published
from calibration.measurements import FOLDER, INDEX
from simulator.engines.engine import split
from simulator.errors import InputError
from simulator.files.csv import csv_text
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.quality import parse_options
from simulator.pruning import FAMILIES, prune

pytestmark = pytest.mark.quick

Row = dict[str, str]

ENGINES = {"reference", "hf", "compile", "vllm", "sglang", "trtllm"}
DENSE, SPEEDUPS, SERVING, PAPER = (
    published(name) for name in ("dense", "speedups", "serving", "paper")
)


def used(rows: list[Row]) -> list[Row]:
    return [r for r in rows if not r["left_out"]]


def whole(row: Row, *names: str) -> bool:
    return all(row[name].isdecimal() and int(row[name]) > 0 for name in names)


def asked(row: Row) -> float | dict[str, float] | list[float]:
    """The sparsity of a row: one, by projection kind, or by layer."""
    if "=" in row["sparsity"]:
        return {k: float(v) for k, v in (part.split("=") for part in row["sparsity"].split(","))}
    fraction, layers = float(row["sparsity"]), len(load_model(row["model"]).layers)
    if not row["first_layer"]:
        return fraction
    first, last = int(row["first_layer"]), int(row["last_layer"] or layers - 1)
    return [fraction if first <= i <= last else 0.0 for i in range(layers)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_row_is_whole_and_names_its_source(name: str) -> None:
    rows = published(name)
    assert rows
    assert all(None not in r and None not in r.values() and r["source"] for r in rows)
    assert all(value == value.strip() and value.isascii() for r in rows for value in r.values())
    # runs of one command can have the same numbers
    assert name == "at_once" or len({tuple(r.values()) for r in rows}) == len(rows)


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(InputError, match="published table 'dens' is unknown; did you mean dense"):
        published("dens")


@pytest.mark.parametrize(
    "row", used(SPEEDUPS), ids=lambda r: f"{r['method']}-{r['gpu']}-{r['seq']}-{r['sparsity']}"
)
def test_a_speedup_can_be_pruned_as_it_says(row: Row) -> None:
    dense = lower(row["model"], phase="prefill", seq=32)
    pruned = prune(
        dense, row["family"], asked(row), **dict(parse_options(row["options"], row["family"]))
    )
    outputs, inner = pruned.is_role("o"), re.search(r"inner=(\d+)", row["options"])
    heads, blocks = (
        re.search(rf"(\d+) of \d+ {part}", row["assumed"]) for part in ("heads", "blocks")
    )
    assert not inner or int(inner[1]) in pruned.k[pruned.is_role("down")]
    assert not heads or int(heads[1]) * load_model(row["model"]).head_dim in pruned.k[outputs]
    assert not blocks or int(blocks[1]) == pruned.count[outputs].sum()


def test_a_source_is_fitted_on_or_judged_on_never_both() -> None:
    rows = [*DENSE, *SPEEDUPS]
    fit, judge = ({r["source"] for r in rows if r["split"] == split} for split in ("fit", "judge"))
    assert fit
    assert judge
    assert not fit & judge
    assert {r["split"] for r in rows} == {"fit", "judge"}
    # sglang's only source determined a default for Hopper; its serving runs judge it
    assert {split(r["engine"])[0] for r in used(DENSE) if r["split"] == "judge"} == ENGINES - {
        "reference",
        "sglang",
    }


def test_serving_rows_are_what_the_provenance_says() -> None:
    entry = yaml.safe_load((FOLDER / INDEX).read_text(encoding="utf-8"))["serving"]
    content = PUBLISHED["serving"].read_bytes()
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert content == csv_text(SERVING).encode()
    assert len(SERVING) == entry["rows"] == 1237
    assert Counter(r["left_out"] for r in SERVING if r["left_out"]) == entry["left_out"]
    assert sorted(entry["left_out"].values()) == [1, 6, 74]
    assert {r["hardware"] for r in SERVING} == {"h100_sxm", "h200_sxm", "b200_sxm"}
    for r in SERVING:
        assert r["weight_dtype"] in ("bf16", "fp8", "fp8_block", "nvfp4")
        assert load_model(r["model"]).name == r["model"]
        assert whole(r, "devices", "concurrency", "seq", "new_tokens")
        assert 0 < float(r["tpot_s"]) < 0.3
        assert float(r["tpot_s"]) < float(r["ttft_s"])
    assert Counter(r["engine"] for r in SERVING) == {"trtllm": 699, "vllm": 384, "sglang": 154}


def test_the_papers_figure_adds_up_and_its_table_is_whole() -> None:
    for phase in ("prefill", "decode"):
        shares = [float(r["value"]) for r in PAPER if (r["phase"], r["metric"]) == (phase, "share")]
        assert sum(shares) == pytest.approx(1.0, abs=0.002)
    table = {
        (r["family"], r["sparsity"], r["phase"]): float(r["value"])
        for r in PAPER
        if r["what"] == "table 2"
    }
    assert len(table) == 20
    assert table["dynamic_depth", "0.25", "decode"] == 0.91
    assert {family for family, _, _ in table} <= set(FAMILIES)
    assert {(r["model"], r["hardware"], r["engine"]) for r in PAPER} == {
        ("llama-3.1-8b", "rtx_pro_6000", "reference")
    }
