"""Read the headers of a checkpoint's ``*.safetensors``; weights are not read.

Use :func:`read_headers` with a folder, :func:`join_headers` with headers that were read before. A file starts with the
length of its header (8 bytes, little-endian), followed by JSON with dtype, shape and byte offsets of each tensor
(https://huggingface.co/docs/safetensors/index). Other files are rejected, and every size that a file states is limited.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from simulator.errors import InputError, one_line
from simulator.files.json import parse_json
from simulator.files.read import read_bounded

MAX_HEADER_BYTES = 8_000_000
"""Longest header of one file; a shard of DeepSeek-V3 with 560 tensors has 60 kB."""

MAX_INDEX_BYTES = 16_000_000
"""Longest index; DeepSeek-V3 with 91,000 tensors has 9 MB."""

MAX_MARKS = 600_000
"""Largest number of the characters , [ and {, each of which can start a value: it limits the memory of parsed JSON."""

MAX_HEADERS_BYTES = 24_000_000
"""Longest headers of one folder together; DeepSeek-V3 has 10 MB."""

MAX_FILES, MAX_TENSORS, MAX_ELEMENTS, MAX_NAME = 4_096, 150_000, 2**44, 400

_BY_BITS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("F64", "I64", "U64"),
}
BITS = MappingProxyType({dtype: bits for bits, dtypes in _BY_BITS.items() for dtype in dtypes})
"""Bits of an element of each dtype of the format."""


_PICKLE = re.compile(r"(?:pytorch_model|model|consolidated|checkpoint)\b.*\.(?:bin|pt|pth)|pytorch_model.*\.bin")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name, from the files in its index or else all its ``*.safetensors``.

    Raises InputError, one line, for a missing or invalid file.
    """
    return join_headers(folder, ((file, *_content(file)) for file in _files(folder)))


def join_headers(folder: Path, files: Iterable[tuple[Path, bytes, int]]) -> dict[str, Tensor]:
    """Return the tensors of files by name; a file is its path, its header, and the number of bytes after the header."""
    found: dict[str, Tensor] = {}
    room = MAX_HEADERS_BYTES
    for file, content, data in files:
        if (room := room - len(content)) < 0:
            raise InputError(f"{folder}: expected headers of at most {MAX_HEADERS_BYTES / 1e6:g} MB together")
        for name, tensor in _tensors(content, data, file):
            if name in found:
                raise InputError(f"{file}: tensor {_short(name)} is in another file too")
            found[name] = tensor
        if len(found) > MAX_TENSORS:
            raise InputError(f"{folder}: expected at most {MAX_TENSORS:,} tensors, got more")
    return found


def refuse_pickles(folder: Path) -> None:
    """Raise InputError if a folder without safetensors has an adapter, or pickles, which can run code."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: it holds a PEFT adapter: merge it into its base model first")
    if names := sorted(p.name for p in folder.iterdir() if _PICKLE.fullmatch(p.name)):
        right = "save the model as safetensors (save_pretrained, safetensors.torch.save_model) or give only config.json"
        raise InputError(f"{folder}: {_short(names[0])} is a pickle, which is never opened: {right}")


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    else:
        names = indexed(read_bounded(index, MAX_INDEX_BYTES), index)
    if len(names) > MAX_FILES:
        raise InputError(f"{folder}: expected at most {MAX_FILES:,} safetensors files, got {len(names):,}")
    check_there(folder, names, (name for name in names if os.path.isfile(folder / name)))
    return [folder / name for name in names]


def indexed(content: bytes, index: Path) -> list[str]:
    """Return the names of the files in an index."""
    parsed = _parsed(content, index)
    entries = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{index}: weight_map: expected a file name for each tensor")
    values = entries.values()
    if any(not isinstance(v, str) or v in (".", "..") or os.path.basename(v) != v or "\0" in v for v in values):
        raise InputError(f"{index}: weight_map: expected names of files in this folder")
    return sorted(set(values))


def check_there(folder: Path, names: Sequence[str], there: Iterable[str]) -> None:
    """Raise InputError if a file of the index is missing."""
    if missing := sorted({*names} - {*there}):
        raise InputError(f"{folder}: {_short(missing[0])} is missing ({len(missing)} of {len(names)} are missing)")


def _content(path: Path) -> tuple[bytes, int]:
    """Return the header of one file and the number of bytes after it.

    Links are followed, as the Hugging Face cache uses them; messages never quote a file's content.
    """
    try:
        with open(path, "rb") as file:
            size, first = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                pointer = " (a Git LFS pointer: fetch the file itself)" if first == b"version " else ""
                raise InputError(f"{path}: is not a safetensors file: its header would not fit into it{pointer}")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {length:,}")
            return file.read(length), size - 8 - length
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _tensors(header: bytes, room: int, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the checked tensors of one file. Their bytes fill the file without overlaps and gaps, as the format
    requires."""
    content = _parsed(header, path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a safetensors file: its header is not a JSON object")
    content.pop("__metadata__", None)
    end = 0
    entries = [(name, *_entry(path, name, value, room)) for name, value in content.items()]
    for name, tensor, start, stop in sorted(entries, key=lambda entry: entry[2:]):
        if start < end:
            raise InputError(f"{path}: tensor {_short(name)}: its bytes overlap those of another tensor")
        if start > end:
            place = f"{path}: tensor {_short(name)}"
            raise InputError(f"{place}: expected its bytes to start at {end:,}, after those before it, got {start:,}")
        end = stop
        yield name, tensor
    if end < room:
        raise InputError(f"{path}: expected tensors of all {room:,} bytes after the header, got tensors of {end:,}")


def _entry(path: Path, name: str, value: Any, room: int) -> tuple[Tensor, int, int]:
    """Return a tensor, and start and end of its bytes."""
    where = f"{path}: tensor {_short(name)}"
    if len(name) > MAX_NAME:
        raise InputError(f"{where}: expected a name of at most {MAX_NAME} characters")
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected dtype, shape and data_offsets")
    tensor, offsets = checked(value.get("dtype"), value.get("shape"), where), value.get("data_offsets")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise InputError(f"{where}: its bytes would lie outside the file")
    if (offsets[1] - offsets[0]) * 8 != tensor.elements * BITS[tensor.dtype]:
        raise InputError(f"{where}: its number of bytes does not match its shape and dtype")
    return tensor, offsets[0], offsets[1]


def checked(dtype: Any, shape: Any, where: str) -> Tensor:
    """Return the tensor of the dtype and shape in a file."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where}: dtype {one_line(repr(dtype), 40)} is unknown")
    if not _counts(shape) or len(shape) > 8 or math.prod(shape) > MAX_ELEMENTS:
        raise InputError(f"{where}: expected a shape of up to 8 sizes, got {one_line(repr(shape), 40)}")
    return Tensor(dtype, tuple(shape))


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value is a list of whole numbers from 0 to MAX_ELEMENTS."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_ELEMENTS for v in value)


def _parsed(content: bytes, path: Path) -> Any:
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_MARKS:
        raise InputError(f"{path}: expected the JSON of a header or an index, got too many values")
    try:
        return parse_json(content, str(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({one_line(str(error), 60)})") from None


def _short(name: str) -> str:
    return one_line(repr(name), 80)
