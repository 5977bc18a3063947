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
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from simulator.operators import MOST_CODES
from simulator.operators.elementwise import CLASSES
from simulator.operators.gemm import check_exact

Arrays = Mapping[str, NDArray[Any]]

MAX_BYTES = 64_000_000  # limit of a file, and of its arrays together
MOST_LOG = 5.0  # log ratio of a measurement to a model: a factor of 148
# most rows of a local update: time and memory of the posterior grow with their square
MOST_ROWS = 2000
# log ratio of the constants of two kernels, one of which may be at the lower end of its range
MOST_FACTOR = 30.0

_FITTED: Mapping[str, tuple[float, float]] = MappingProxyType(
    dict.fromkeys(("values", "row_values", "log_ratio"), (-MOST_LOG, MOST_LOG))
    | {
        "factors": (-MOST_FACTOR, MOST_FACTOR),
        "exact_log_half": (0.0, MOST_LOG),
    }
)
"""Array that a fit computes from times -> lowest and highest value."""

_LOCAL_UPDATE: Mapping[str, tuple[tuple[int, ...], str, float, float]] = MappingProxyType(
    {
        "log_ratio": ((), "(rows,)", *_FITTED["log_ratio"]),
        "systematic": ((0,), "(rows, factors)", -100.0, 100.0),
        "independent": ((), "(rows,)", 0.0, MOST_LOG**2),
        "correlated": ((), "(rows,)", 0.0, MOST_LOG),
        "coordinates": ((3,), "(rows, 3)", -100.0, 100.0),
        "kind": ((), "(rows,)", 0.0, float(MOST_CODES - 1)),
    }
)
"""Array of a local update -> axes after the rows (0: any length), shape in words, lowest and
highest value."""

_MOST_COORDINATE = 1e6  # coordinates are logarithms, indices and shares
_LEAST_STEP = 1e-3

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
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(
                f"{path.name} is not a regular file; expected the .npz that was saved with the"
                " profile"
            )
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(
            f"{path.name} cannot be read ({error.strerror}); expected it next to the profile"
        ) from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_BYTES / 1e6:g} MB")
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
    arrays. The prefix is ``operator.dtype`` or ``local_update``."""
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
    if operator == "gemm":
        if "exact_m" in arrays:
            check_exact(arrays)
            _check(arrays, "exact_log_half", True, "")
            _check(arrays, "exact_s", True, "", 1e-12, 1e9)
        if "row_m" in arrays:  # the residual of GEMMs on a CPU by the number of rows
            _need(arrays, "row_m", "row_values")
            m = arrays["row_m"]
            good = m.ndim == 1 and m.size >= 1 and bool((np.diff(m) > 0).all())
            _check(arrays, "row_m", good, "(sizes,), ascending", 1.0, 2.0**31)
            _check(arrays, "row_values", arrays["row_values"].shape == m.shape, f"{m.shape}")
        if "measured" in arrays:
            _check(arrays, "measured", arrays["measured"].shape == (2, 3), "(2, 3)", 0.0, 64.0)
    if operator == "local_update":
        _check_update(arrays)
    elif "values" in arrays:
        _check_values(operator, arrays)


def clipped(arrays: Arrays) -> Arrays:
    """Return arrays whose fitted values are within their limits; the same object if they are."""
    found = {
        name: np.clip(array, *_FITTED[name]) for name, array in arrays.items() if name in _FITTED
    }
    same = all(np.array_equal(array, arrays[name]) for name, array in found.items())
    return arrays if same else MappingProxyType({**arrays, **found})


def _check_values(operator: str, arrays: Arrays) -> None:
    """Check a residual grid over three coordinates, or the grids of the elementwise classes over
    one coordinate."""
    shape = arrays["values"].shape
    place = (-_MOST_COORDINATE, _MOST_COORDINATE)
    if operator == "elementwise":
        _need(arrays, "values", "start")
        good = len(shape) == 2 and 1 <= shape[0] <= len(CLASSES) and shape[1] >= 1
        _check(arrays, "values", good, f"({len(CLASSES)}, nodes), or fewer classes")
        _check(arrays, "start", arrays["start"].shape == (), "a single number", *place)
        return
    _need(arrays, "values", "start", "step")
    _check(
        arrays,
        "values",
        len(shape) == 3 and math.prod(shape) > 0,
        "(a, b, c), at least one of each",
    )
    _check(arrays, "start", arrays["start"].shape == (3,), "(3,)", *place)
    _check(arrays, "step", arrays["step"].shape == (3,), "(3,)", _LEAST_STEP, _MOST_COORDINATE)
    # kernels by head width, window and cache, whose grids are joined along the last axis
    if "kinds" in arrays:
        _need(arrays, "kinds", "factors")
        kinds, factors = arrays["kinds"].shape, arrays["factors"].shape
        good = len(kinds) == 2 and kinds[1] == 3 and kinds[0] >= 1 and shape[2] % kinds[0] == 0
        _check(
            arrays, "kinds", good, "(v, 3), v a divisor of the last dimension of values", 0.0, 20.0
        )
        _check(
            arrays,
            "factors",
            len(factors) == 2 and factors[0] == kinds[0],
            f"({kinds[0]}, constants)",
        )


def _check_update(arrays: Arrays) -> None:
    """Check rows measured on the user's machine: log errors, and their inputs to the error
    model."""
    _need(arrays, "log_ratio", *_LOCAL_UPDATE)
    count = arrays["log_ratio"].shape[:1]
    for name, (more, expected, low, high) in _LOCAL_UPDATE.items():
        shape = arrays[name].shape
        good = (
            len(shape) == 1 + len(more)
            and shape[:1] == count
            and (more == (0,) or shape[1:] == more)
        )
        good = good and 1 <= shape[0] <= MOST_ROWS
        _check(arrays, name, good, f"{expected}, rows from 1 to {MOST_ROWS}", low, high)
    if arrays["kind"].dtype.kind not in "iu":
        raise ValueError(f"array kind: expected whole numbers, got {arrays['kind'].dtype}")


def _need(arrays: Arrays, first: str, *others: str) -> None:
    for name in others:
        if name not in arrays:
            raise ValueError(f"array {first} needs array {name}, which is missing")


def _check(arrays: Arrays, name: str, good: bool, expected: str, *limits: float) -> None:
    """Check the shape and the values of an array; the limits of a fitted array are in
    ``_FITTED``."""
    array = np.asarray(arrays[name], dtype=np.float64)
    low, high = limits or _FITTED[name]
    if not good:
        raise ValueError(f"array {name}: expected the shape {expected}, got {array.shape}")
    if array.size and not (low <= array.min() and array.max() <= high):
        found = f"{array.min():g} to {array.max():g}"
        raise ValueError(f"array {name}: expected values from {low:g} to {high:g}, got {found}")
