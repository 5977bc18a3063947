"""Arrays of a profile: a plain ``.npz`` whose bytes depend on its content alone, read without pickle and with every size checked first."""

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

MAX_FILE_BYTES = 64_000_000
MAX_ARRAY_BYTES = 64_000_000

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.npz")
"""A bare file name: no folder, no drive, no dot file."""
ARRAY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

# what numpy writes in front of the numbers, and nothing else: no expression of the file is ever evaluated
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00[\s\S]{2}\{'descr': '([<>=|]?[A-Za-z][0-9]{0,8})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,9},? ?){0,8})\), \} *\n"
)
_DATE = (1980, 1, 1, 0, 0, 0)  # the first a zip file can hold: the same arrays give the same bytes on any day


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays to the bytes of an ``.npz``: sorted, uncompressed, dated 1980, so that equal arrays give equal bytes.

    Raises
    ------
    ValueError
        For an array that is not numeric or not finite.

    Examples
    --------
    >>> a = {"x": np.arange(3.0)}
    >>> pack_arrays(a) == pack_arrays(a), float(np.load(io.BytesIO(pack_arrays(a)))["x"][2])
    (True, 2.0)
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name]) if np.ndim(arrays[name]) else np.asarray(arrays[name])
            _check_values(name, array)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            item = io.BytesIO()
            npy.write_array(item, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _DATE)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, item.getvalue())
    return buffer.getvalue()


def read_arrays(path: Path, sha256: str, prefix: str, names: tuple[str, ...]) -> Mapping[str, NDArray[Any]]:
    """Arrays ``prefix.name`` of an ``.npz`` with that digest, read-only, keyed by name.

    Raises
    ------
    ValueError
        One line: missing, too large, another digest, no zip file, a missing entry, an object (pickled) or non-finite array.
    """
    raw = _read(path)
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path.name} has sha256 {found[:12]}..., expected {sha256[:12]}...: it belongs to another version of the profile"
        )
    return MappingProxyType({name: _entry(raw, f"{prefix}.{name}") for name in names})


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path.name} is no regular file; expected the .npz that was saved with the profile")
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror}); expected it beside the profile") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_FILE_BYTES / 1e6:g} MB")
    return raw


def _entry(raw: bytes, name: str) -> NDArray[Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            info = archive.getinfo(f"{name}.npy")
            item = archive.read(info) if info.file_size <= MAX_ARRAY_BYTES else None
    except KeyError:
        raise ValueError(f"array {name} is not in the .npz; save both files again") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,
        ValueError,
    ) as error:
        raise ValueError(f"is no readable .npz ({str(error)[:80]}); save both files again") from None
    if item is None:
        raise ValueError(f"array {name} is larger than {MAX_ARRAY_BYTES / 1e6:g} MB")
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
    data = item[match.end() :]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"array {name} does not have the size its header says; save both files again")
    array = (
        np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran == "True" else "C")
        if data
        else np.empty(shape, dtype)
    )
    _check_values(name, array)
    array = array.astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array


def _check_values(name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"array {name} has type {array.dtype}, expected numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"array {name} holds values that are not finite")
