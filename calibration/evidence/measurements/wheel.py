"""Read the tables of the wheel aiconfigurator-core that ``selection.yaml`` selects
(:data:`CHOICES`).

    pip download --no-deps --only-binary :all: --python-version 3.11 --platform
    manylinux_2_28_x86_64 \\
        aiconfigurator-core==0.12.0
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.evidence.measurements import FOLDER
from calibration.measurements import hardware_of, read_tables
from calibration.records.importers import import_table
from calibration.records.screening import LATENT, Refusals
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
    hardware: str  # profile with the datasheet that limits its times
    stack: str  # nccl: for every stack
    path: str  # in the folder of data: system/operator/backend/version/file
    formats: tuple[str, ...] = ()  # as Records.labels names them; empty: all
    ships: tuple[str, ...] = ()  # formats of the shipped table; empty: in the wheel only
    kernel: str = ""  # selected kernels, separated by blanks; empty: all

    @property
    def member(self) -> str:
        return f"aiconfigurator_core/systems/data/{self.path}_perf.parquet"


def _choices() -> dict[str, SelectedTable]:
    out = {}
    for name, entry in read_tables(FOLDER / "selection.yaml").items():
        # a second table of a stack has its version in its name
        stack = name.split("/")[2].split("-")[0]
        formats, ships = (tuple(entry.get(key, ())) for key in ("formats", "ships"))
        out[name] = SelectedTable(
            hardware_of(name), stack, entry["path"], formats, ships, entry.get("kernel", "")
        )
    return out


CHOICES: Mapping[str, SelectedTable] = _choices()


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


def read_choice(
    archive: zipfile.ZipFile, choice: SelectedTable
) -> tuple[Records, dict[str, int], Refusals]:
    """Return a table's rows, sorted, with times in single precision; excluded and refused rows by
    reason."""
    hw = datasheet(choice.hardware)
    content = archive.read(choice.member)
    result = import_table(choice.member, content=content, hw=hw)
    records, left = choose(result.records, choice)
    by = ("heads", "kv_heads", "head_dim", "window", "role", "experts", "active", "skew")
    return in_order(records, by), left, result.refusals


def in_order(records: Records, columns: Sequence[str]) -> Records:
    """Return the rows with times in single precision, sorted by format, ``columns`` (the last
    first) and size."""
    by = ("m", "kv_len", "q_len", "batch", "k", "n", *columns)
    records = records.select(np.lexsort([getattr(records, name) for name in by]))
    records = records.select(np.argsort(records.labels().astype(str), kind="stable")).tidy()
    return records.replace(seconds=records.seconds.astype(np.float32).astype(np.float64))


def choose(records: Records, choice: SelectedTable) -> tuple[Records, dict[str, int]]:
    kernels = np.array([s.kernel for s in records.sources])[records.source]
    labels = records.labels().astype(str)
    attention = records.is_operator("attention_prefill", "attention_decode")
    widths = ", ".join(map(str, HEAD_DIMS))
    reasons = {
        f"kernel other than {choice.kernel}": ~np.isin(kernels, choice.kernel.split())
        & bool(choice.kernel),
        f"number format not among {', '.join(choice.formats)}": ~np.isin(
            labels, choice.formats or labels
        ),
        f"features per head not among {widths}": attention & ~np.isin(records.head_dim, HEAD_DIMS),
        f"over {STALL:g} times the time of a call of more work": stalled(records),
        "timed twice, over 10 % apart": records.is_operator(*LATENT)
        & (records.flags & Flag.CONFLICT > 0),
    }
    return exclude(records, reasons)


def stalled(records: Records) -> Array:
    """Return a mask of the rows of latent attention that were delayed, because a call of more work
    was faster."""
    out = np.zeros(len(records), dtype=np.bool_)
    labels = records.labels().astype(str)
    for label in np.unique(labels):
        rows = np.flatnonzero(records.is_operator(*LATENT) & (labels == label))
        sizes = [getattr(records, name)[rows] for name in ("batch", "heads", "kv_len")]
        out[rows] = beaten(sizes, records.seconds[rows], STALL)
    return out


def beaten(sizes: Sequence[Array], seconds: Array, factor: float) -> Array:
    """Return a mask of the rows that took over ``factor`` times the time of a row of no smaller
    size."""
    out = np.zeros(len(seconds), dtype=np.bool_)
    for row, time in enumerate(seconds):
        more = np.logical_and.reduce([size >= size[row] for size in sizes])
        out[row] = factor * seconds[more].min() < time
    return out


def shipped_part(records: Records, choice: SelectedTable) -> tuple[Records, dict[str, int]]:
    other = ~np.isin(records.labels().astype(str), choice.ships)
    reasons = {
        f"number format other than {', '.join(choice.ships)}": other,
        "sliding window": records.window > 0,
    }
    return exclude(
        records, {f"in the wheel only: {reason}": mask for reason, mask in reasons.items()}
    )


def exclude(records: Records, reasons: Mapping[str, Array]) -> tuple[Records, dict[str, int]]:
    kept = np.ones(len(records), dtype=np.bool_)
    left = {}
    for reason, mask in reasons.items():
        if count := int((mask & kept).sum()):
            left[reason] = count
        kept &= ~mask
    return records.select(kept).tidy(), left
