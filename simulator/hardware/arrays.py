"""Read, check and pack the arrays of a profile, an ``.npz`` whose bytes depend only on its content.

A profile can come from an untrusted source, so pickles are never read and sizes are checked first.
Arrays that pass :func:`check_arrays` cannot fail in a cost model, and cannot make a time that is
zero, infinite or NaN.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from simulator.files.read import read_bounded
from simulator.operators.elementwise import CLASSES
from simulator.operators.gemm import EXACT_BITS

Arrays = Mapping[str, NDArray[Any]]

MAX_BYTES = 64_000_000  # limit of a file, and of its arrays together
MOST_LOG = 5.0  # log ratio of a measurement to a model: a factor of 148
# log ratio of the constants of two kernels, one of which may be at the lower end of its range
MOST_FACTOR = 30.0

_LOGS = (-MOST_LOG, MOST_LOG)
_PLACE = (-1e6, 1e6)  # coordinates are logarithms, indices and shares
_GROUPS: Mapping[str, Mapping[str, tuple[str, float, float]]] = MappingProxyType(
    {
        "exact": {
            **{name: ("shapes", 1.0, 2.0**bits - 2.0) for name, bits in EXACT_BITS.items()},
            "exact_s": ("shapes", 1e-12, 1e9),
            "exact_log_half": ("shapes", 0.0, MOST_LOG),
        },
        "measured": {"measured": ("2 3", 0.0, 64.0)},
        # the residual of GEMMs on a CPU by the number of rows
        "by_rows": {"row_m": ("sizes", 1.0, 2.0**31), "row_values": ("sizes", *_LOGS)},
        "grid": {
            "values": ("a b c", *_LOGS),
            "start": ("3", *_PLACE),
            "step": ("3", 1e-3, _PLACE[1]),
        },
        # kernels by head width, window and cache, whose grids are joined along the last axis
        "kernels": {
            "kinds": ("v 3", 0.0, 20.0),
            "factors": ("v constants", -MOST_FACTOR, MOST_FACTOR),
        },
        # grids of the elementwise classes over one coordinate
        "classes": {"values": ("classes nodes", *_LOGS), "start": ("", *_PLACE)},
    }
)
"""Arrays that belong together: sizes of the axes (equal names have equal sizes), lowest and highest
value. The first array needs the others."""

_OF = {"elementwise": ("classes",)}
_OF_OTHERS = ("exact", "measured", "by_rows", "grid", "kernels")
_MOST_SIZE = {"classes": len(CLASSES)}
_MAY_BE_NONE = ("constants", "shapes")

_FITTED = {
    name: rule[1:]
    for group in _GROUPS.values()
    for name, rule in group.items()
    if name in ("values", "row_values", "factors", "exact_log_half")
}
"""Array that a fit computes from times -> lowest and highest value."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.npz")  # without a folder or a drive
ARRAY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

# only the header that NumPy writes is accepted: no expression of a file is ever evaluated
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00[\s\S]{2}\{'descr': '([<>=|]?[A-Za-z][0-9]{0,8})', 'fortran_order':"
    rb" (True|False), "
    rb"'shape': \(((?:[0-9]{1,9},? ?){0,8})\), \} *\n"
)
# the first date of a zip file: equal arrays give equal bytes on any day
_DATE = (1980, 1, 1, 0, 0, 0)
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)


def pack_arrays(arrays: Arrays) -> bytes:
    """Return the bytes of an ``.npz``: sorted, uncompressed and dated 1980, so equal arrays give
    equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = np.asarray(arrays[name], order="C")
            _check_numbers(name, array)
            item = io.BytesIO()
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            npy.write_array(item, little, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.create_system = 3  # as on Unix, on every system
            info.external_attr = 0o644 << 16
            archive.writestr(info, item.getvalue())
    return buffer.getvalue()


def read_archive(path: Path, sha256: str) -> Mapping[str, bytes]:
    """Return the files in an ``.npz`` by name; ValueError, one line, for another file or digest."""
    raw = read_bounded(path, MAX_BYTES, f"{path.name} next to the profile ")
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        belongs = "it belongs to another version of the profile"
        raise ValueError(
            f"{path.name} has sha256 {found[:12]}..., expected {sha256[:12]}...: {belongs}"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(info.file_size for info in archive.infolist()) <= MAX_BYTES:
                # the limit matters: an entry can hold more than the archive states
                return {
                    i.filename: archive.open(i).read(i.file_size + 1) for i in archive.infolist()
                }
    except _DAMAGED as error:
        raise ValueError(
            f"is not a readable .npz ({str(error)[:80]}); save both files again"
        ) from None
    raise ValueError(f"{path.name} holds arrays larger than {MAX_BYTES / 1e6:g} MB")


def read_arrays(items: Mapping[str, bytes], prefix: str, names: tuple[str, ...]) -> Arrays:
    """Return the read-only arrays ``prefix.name`` of an archive by name; ValueError for invalid
    arrays. The prefix is ``operator.dtype``."""
    arrays = MappingProxyType(
        {name: _array(f"{prefix}.{name}", items.get(f"{prefix}.{name}.npy")) for name in names}
    )
    check_arrays(prefix.split(".")[0], arrays)
    return arrays


def _array(name: str, item: bytes | None) -> NDArray[Any]:
    if item is None:
        raise ValueError(f"array {name} is not in the .npz; save both files again")
    match = _HEADER.match(item)
    if match is None:
        raise ValueError(f"array {name} has a bad header; save both files again")
    kind, fortran, dims = (group.decode() for group in match.groups())
    if kind[1] == "O":
        raise ValueError(
            f"array {name} holds pickled objects, which are never read; expected numbers"
        )
    if not re.fullmatch(r"[<>=|](b1|[iu][1248]|f[248])", kind):  # NumPy has no others, such as f1
        raise ValueError(f"array {name} has type {kind}, expected numbers")
    dtype = np.dtype(kind)
    shape = tuple(int(n) for n in dims.split(",") if n.strip())
    if math.prod(shape) * dtype.itemsize != len(item) - match.end():
        raise ValueError(
            f"array {name} does not have the size its header says; save both files again"
        )
    flat = (
        np.frombuffer(item, dtype, offset=match.end()) if math.prod(shape) else np.empty(0, dtype)
    )
    array = flat.reshape(shape, order="F" if fortran == "True" else "C")
    _check_numbers(name, array)
    array = array.astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array


def _check_numbers(name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"array {name} has type {array.dtype}, expected numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"array {name} holds values that are not finite")


def check_arrays(operator: str, arrays: Arrays) -> None:
    """Raise ValueError, one line, for arrays that the cost model of an operator cannot use; ignore
    unknown names."""
    for group in (_GROUPS[name] for name in _OF.get(operator, _OF_OTHERS)):
        if next(iter(group)) in arrays:
            _check_group(group, arrays)
    if "row_m" in arrays and (np.diff(arrays["row_m"]) <= 0).any():
        raise ValueError("array row_m: expected ascending numbers")
    if {"kinds", "values"} <= arrays.keys() and arrays["values"].shape[-1] % len(arrays["kinds"]):
        raise ValueError("array kinds: expected a number that divides the last axis of values")


def _check_group(group: Mapping[str, tuple[str, float, float]], arrays: Arrays) -> None:
    sizes: dict[str, int] = {}
    for name, (shape, low, high) in group.items():
        if name not in arrays:
            raise ValueError(f"array {next(iter(group))} needs array {name}, which is missing")
        array, axes = np.asarray(arrays[name], dtype=np.float64), shape.split()
        fits = len(axes) == array.ndim and all(
            size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
            for axis, size in zip(axes, array.shape)
        )
        if not fits:
            expected = f"expected the shape ({', '.join(axes)})"
            raise ValueError(f"array {name}: {expected}, got {array.shape}")
        if array.size and not (low <= array.min() and array.max() <= high):
            found = f"{array.min():g} to {array.max():g}"
            raise ValueError(f"array {name}: expected values from {low:g} to {high:g}, got {found}")
        if name in EXACT_BITS and (array != np.floor(array)).any():
            raise ValueError(f"array {name}: expected whole numbers")
    for axis, size in sizes.items():
        least, most = int(axis not in _MAY_BE_NONE), _MOST_SIZE.get(axis, MAX_BYTES)
        if not least <= size <= most:
            expected = f"expected {axis} from {least} to {most}"
            raise ValueError(f"array {next(iter(group))}: {expected}, got {size}")


def clipped(arrays: Arrays) -> Arrays:
    """Return arrays whose fitted values are within their limits; the same object if they are."""
    found = {
        name: np.clip(array, *_FITTED[name]) for name, array in arrays.items() if name in _FITTED
    }
    same = all(np.array_equal(array, arrays[name]) for name, array in found.items())
    return arrays if same else MappingProxyType({**arrays, **found})
