"""Measured tables (``device/operator/stack``), each with its provenance, and published values that
commands read: ``fit`` and ``figures --measured`` read the tables, ``fit`` also the ratios of GEMMs,
and ``paper`` the taxonomy paper's numbers. PROVENANCE.yaml states how the tables were made from
published packages; NOTICE names their authors."""

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

PUBLISHED: Mapping[str, Path] = {
    "gemm_ratios": FOLDER / "published_gemm_ratios.csv",
    "paper": FOLDER / "published_paper.csv",
}
# device of a table -> its profile, where the names differ
_PROFILES = {"a100_sxm": "a100_sxm_80gb"}


def file_name(name: str) -> str:
    return name.replace("/", ".") + ".parquet"


def list_measurements() -> tuple[str, ...]:
    return tuple(read_tables(FOLDER / INDEX))


def hardware_of(name: str) -> str:
    """Return the name of the profile of a table's device."""
    device = name.split("/")[0]
    return _PROFILES.get(device, device)


def provenance(name: str) -> Mapping[str, Any]:
    """Return the origin of a table: package, path, device, software, kept and refused rows, digest,
    licence."""
    index = read_tables(FOLDER / INDEX)
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


def read_tables(path: Path) -> dict[str, dict[str, Any]]:
    return _parsed(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=3)  # parsing takes as long as reading several tables
def _parsed(text: str) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = yaml.load(
        text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )["tables"]
    return index


def published(name: str, tables: Mapping[str, Path] = PUBLISHED) -> list[dict[str, str]]:
    """Return the rows of a published table as text, each with its source."""
    if name not in tables:
        raise unknown("published table", name, tables)
    with tables[name].open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
