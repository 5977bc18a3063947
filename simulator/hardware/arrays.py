"""Arrays of a profile: an ``.npz`` whose bytes depend on its content alone, read without pickle, sizes first."""

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

MAX_BYTES = 64_000_000
"""Largest file, and largest array, that is read."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.npz")
"""A bare file name: no folder, no drive, no dot file."""
ARRAY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

# what numpy writes in front of the numbers, and nothing else: no expression of the file is ever evaluated
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00[\s\S]{2}\{'descr': '([<>=|]?[A-Za-z][0-9]{0,8})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,9},? ?){0,8})\), \} *\n"
)
_DATE = (1980, 1, 1, 0, 0, 0)  # the first a zip file can hold: the same arrays give the same bytes on any day
# fmt: off
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, NotImplementedError, ValueError
)
# fmt: on


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays to the bytes of an ``.npz``: sorted, uncompressed, dated 1980, so that equal arrays give equal bytes.

    Raises ValueError for an array that is not numeric or not finite.

    >>> a = {"x": np.arange(3.0)}
    >>> pack_arrays(a) == pack_arrays(a), float(np.load(io.BytesIO(pack_arrays(a)))["x"][2])
    (True, 2.0)
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = np.asarray(arrays[name], order="C")
            _check_values(name, array)
            item = io.BytesIO()
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            npy.write_array(item, little, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.create_system = 3  # as on Unix, on every system
            info.external_attr = 0o644 << 16
            archive.writestr(info, item.getvalue())
    return buffer.getvalue()


def read_arrays(path: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Mapping[str, NDArray[Any]]:
    """Arrays ``prefix.name`` of an ``.npz`` with that digest, read-only, keyed by name.

    Raises ValueError, one line: the file is missing, too large, of another digest or no zip, or an array is missing,
    pickled or not finite.
    """
    raw = _read(path)
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        belongs = "it belongs to another version of the profile"
        raise ValueError(f"{path.name} has sha256 {found[:12]}..., expected {sha256[:12]}...: {belongs}")
    return MappingProxyType({name: _array(f"{prefix}.{name}", raw) for name in names})


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path.name} is no regular file; expected the .npz that was saved with the profile")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror}); expected it beside the profile") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_BYTES / 1e6:g} MB")
    return raw


def _array(name: str, raw: bytes) -> NDArray[Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            info = archive.getinfo(f"{name}.npy")
            item = archive.read(info) if info.file_size <= MAX_BYTES else None
    except KeyError:
        raise ValueError(f"array {name} is not in the .npz; save both files again") from None
    except _UNREADABLE as error:
        raise ValueError(f"is no readable .npz ({str(error)[:80]}); save both files again") from None
    if item is None:
        raise ValueError(f"array {name} is larger than {MAX_BYTES / 1e6:g} MB")
    match = _HEADER.match(item)
    if match is None:
        raise ValueError(f"array {name} has a bad header; save both files again")
    kind, fortran, dims = (group.decode() for group in match.groups())
    if kind[1] == "O":
        raise ValueError(f"array {name} holds pickled objects, which are never read; expected numbers")
    if not re.fullmatch(r"[<>=|][biuf][1248]", kind):
        raise ValueError(f"array {name} has type {kind}, expected numbers")
    dtype = np.dtype(kind)
    shape = tuple(int(n) for n in dims.split(",") if n.strip())
    if math.prod(shape) * dtype.itemsize != len(item) - match.end():
        raise ValueError(f"array {name} does not have the size its header says; save both files again")
    flat = np.frombuffer(item, dtype, offset=match.end()) if math.prod(shape) else np.empty(0, dtype)
    array = flat.reshape(shape, order="F" if fortran == "True" else "C")
    _check_values(name, array)
    array = array.astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array


def _check_values(name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"array {name} has type {array.dtype}, expected numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"array {name} holds values that are not finite")
