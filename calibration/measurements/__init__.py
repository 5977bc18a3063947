"""Measured tables that ship: GEMM and attention times of several GPUs, each with its provenance, so that fits and
validation run offline.

:func:`list_measurements` names them (``device/operator/stack``), :func:`load_measurements` reads one,
:func:`provenance` says where it is from. The files are made from a published Apache-2.0 package by ``build.py`` (see
there); NOTICE names its authors. :func:`published` reads what papers, projects and serving runs measured of whole
models, one row a value.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from calibration.records.parquet import read_records
from calibration.records.table import Records
from simulator.errors import InputError, unknown

FOLDER = Path(__file__).resolve().parent
INDEX = "PROVENANCE.yaml"

PUBLISHED: Mapping[str, str] = {
    "dense": "published_dense.csv",
    "speedups": "published_speedups.csv",
    "gemm_ratios": "published_gemm_ratios.csv",
    "paper": "published_paper.csv",
    "serving": "serving.csv",
}
"""Files of what was measured of whole models (dense, pruned, in the taxonomy paper, serving) and of single GEMMs."""


def file_name(name: str) -> str:
    """File of a table: ``h100_sxm.gemm.trtllm.parquet``."""
    return name.replace("/", ".") + ".parquet"


def list_measurements() -> tuple[str, ...]:
    """Names of the tables, as ``device/operator/stack``."""
    return tuple(_index())


def provenance(name: str) -> Mapping[str, Any]:
    """Where a table is from: package, path in it, device, software, rows kept, refused and why, digest, licence."""
    index = _index()
    if name not in index:
        raise unknown("measurement", name, index)
    return index[name]


def load_measurements(name: str, dtype: str | None = None) -> Records:
    """Read a table, of one number format as :meth:`Records.labels` names them (``bf16``, ``int8_wo``) or of all.

    GEMMs have ``copies`` rotated weights; times are those of CUDA-graph replays, in seconds. InputError: there is no
    such table or format, or the file is not the one its provenance describes.

    >>> len(load_measurements("a100_sxm/gemm/trtllm", dtype="bf16"))
    9240
    """
    digest = provenance(name)["sha256"]
    path = FOLDER / file_name(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{path}: is not the file {INDEX} describes (its SHA-256 differs)")
    records = read_records(content)
    return records if dtype is None else records.of_dtype(dtype)


def _index() -> dict[str, dict[str, Any]]:
    """The provenance of every table."""
    index: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / INDEX).read_text(encoding="utf-8"))["tables"]
    return index


def published(name: str) -> list[dict[str, str]]:
    """Rows of a table of :data:`PUBLISHED` as text, each with its source.

    Values are SI unless the row has a ``unit``. ``assumed`` is what the source leaves open, ``reason`` the likely one
    of a miss, ``left_out`` why a row cannot be predicted (empty: it can). Parameters of an engine are fitted on rows of
    ``split`` "fit" and judged on those of "judge"; no source is in both. In "dense", ``phase`` is prefill, decode,
    generate (a prefill of ``seq`` tokens, then ``new_tokens``) or serve (``batch`` requests kept running), and
    ``metric`` is time_s (of a prefill or a step), tokens_per_s (new tokens of all sequences over the time of all, over
    a step in decode) or all_tokens_per_s (prompt and new tokens). In "speedups", ``own_code`` says that the pruned
    model ran in other modelling code than the dense one, from ``first_layer`` to ``last_layer`` of those it prunes.

    >>> published("paper")[0]["value"]
    '2.19'
    """
    if name not in PUBLISHED:
        raise unknown("published table", name, PUBLISHED)
    with (FOLDER / PUBLISHED[name]).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
