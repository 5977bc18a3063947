"""Shipped measured tables (``device/operator/stack``), each with its provenance, and published
measurements of whole models. ``build.py`` makes the files from a published Apache-2.0 package;
NOTICE names its authors."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from calibration.records.timing_table import Records, read_records
from simulator.errors import InputError, unknown

FOLDER = Path(__file__).resolve().parent
INDEX = "PROVENANCE.yaml"

# files of published measurements: whole models (dense, pruned, the taxonomy paper, serving), single
# GEMMs and collectives
PUBLISHED: Mapping[str, str] = {
    "dense": "published_dense.csv",
    "speedups": "published_speedups.csv",
    "gemm_ratios": "published_gemm_ratios.csv",
    "collectives": "published_collectives.csv",
    "paper": "published_paper.csv",
    "serving": "serving.csv",
}


def file_name(name: str) -> str:
    return name.replace("/", ".") + ".parquet"


def list_measurements() -> tuple[str, ...]:
    return tuple(read_tables(INDEX))


def provenance(name: str) -> Mapping[str, Any]:
    """Return the origin of a table: package, path, device, software, kept and refused rows, digest,
    licence."""
    index = read_tables(INDEX)
    if name not in index:
        raise unknown("measurement", name, index)
    return index[name]


def load_measurements(name: str, dtype: str | None = None) -> Records:
    """Read a table, in one number format (a label such as ``int8_wo``) or in all."""
    digest = provenance(name)["sha256"]
    path = FOLDER / file_name(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{path}: SHA-256: expected {digest}, as in {INDEX}, got another one")
    records = read_records(content)
    return records if dtype is None else records.of_dtype(dtype)


def read_tables(file: str) -> dict[str, dict[str, Any]]:
    return _parsed((FOLDER / file).read_text(encoding="utf-8"))


@lru_cache(maxsize=3)  # parsing takes as long as reading several tables
def _parsed(text: str) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = yaml.load(
        text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )["tables"]
    return index


def published(name: str) -> list[dict[str, str]]:
    """Return the rows of a table of :data:`PUBLISHED` as text, each with its source.

    Values are SI unless the row has a ``unit``. ``assumed`` lists facts that the source does not
    state, ``reason`` the likely reason of a large error, ``left_out`` why a row cannot be predicted
    (empty: it can). Parameters of an engine are fitted on rows with ``split`` "fit" and evaluated
    on rows with "judge"; no source is in both. ``metric`` is time_s (of a prefill or a step),
    tokens_per_s (new tokens of all sequences over the total time, or over a decode step) or
    all_tokens_per_s (prompt and new tokens). ``own_code`` marks a pruned model that ran other
    modelling code than the dense model; it prunes the layers ``first_layer`` to ``last_layer``.
    """
    if name not in PUBLISHED:
        raise unknown("published table", name, PUBLISHED)
    with (FOLDER / PUBLISHED[name]).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
