"""Read the headers of a checkpoint's ``*.safetensors`` by the package of that name; weights are not read.

Every size that a file states is limited before it is read. Pickles are rejected, since they can run code.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open

from simulator.errors import InputError, one_line
from simulator.files.json import parse_bounded
from simulator.files.read import read_bounded

MAX_HEADER_BYTES = 8_000_000  # of one file; a shard of DeepSeek-V3 with 560 tensors has 60 kB
MAX_HEADERS_BYTES = 24_000_000  # of all files; DeepSeek-V3 has 10 MB
MAX_INDEX_BYTES = 16_000_000  # DeepSeek-V3 with 91,000 tensors has 9 MB
MAX_FILES, MAX_TENSORS, MAX_ELEMENTS, MAX_NAME, MAX_AXES = 4_096, 150_000, 2**44, 400, 8

_DTYPES = "F4 F6_E2M3 F6_E3M2 U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64"
BITS = MappingProxyType({"BOOL": 8} | {name: int(re.split(r"[A-Z]+|_", name)[1]) for name in _DTYPES.split()})
"""Bits of an element of each dtype."""

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
    """Return the tensors of a folder by name, from the files in its index or else all its ``*.safetensors``."""
    found: dict[str, Tensor] = {}
    room = MAX_HEADERS_BYTES
    for path in _files(folder):
        room -= _header_bytes(path)
        if room < 0:
            raise InputError(f"{folder}: expected headers of at most {MAX_HEADERS_BYTES / 1e6:g} MB together")
        try:
            with safe_open(path, framework="np") as file:
                for name in list(file.keys()):
                    part = file.get_slice(name)
                    if name in found:
                        raise InputError(f"{path}: tensor {_short(name)} is in another file too")
                    found[name] = _tensor(name, part.get_dtype(), part.get_shape(), path)
        except (SafetensorError, OSError) as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            again = "download it or save it again"
            raise InputError(f"{path}: is not a safetensors file: {one_line(reason, 160)}; {again}") from None
        if len(found) > MAX_TENSORS:
            raise InputError(f"{folder}: expected at most {MAX_TENSORS:,} tensors, got more")
    return found


def refuse_pickles(folder: Path) -> None:
    """Raise InputError if a folder without safetensors has an adapter, or pickles."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: it holds a PEFT adapter: merge it into its base model first")
    if names := sorted(p.name for p in folder.iterdir() if _PICKLE.fullmatch(p.name)):
        right = "save the model as safetensors (save_pretrained, safetensors.torch.save_model) or give only config.json"
        raise InputError(f"{folder}: {_short(names[0])} is a pickle, which is never opened: {right}")


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parsed = parse_bounded(read_bounded(index, MAX_INDEX_BYTES), str(index), MAX_INDEX_BYTES)
        entries = parsed.get("weight_map") if isinstance(parsed, dict) else None
        if not isinstance(entries, dict) or not entries:
            raise InputError(f"{index}: weight_map: expected a file name for each tensor")
        values = entries.values()
        if any(not isinstance(v, str) or v in (".", "..") or os.path.basename(v) != v or "\0" in v for v in values):
            raise InputError(f"{index}: weight_map: expected names of files in this folder")
        names = sorted(set(values))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if len(names) > MAX_FILES:
        raise InputError(f"{folder}: expected at most {MAX_FILES:,} safetensors files, got {len(names):,}")
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise InputError(f"{folder}: {_short(missing[0])} is missing ({len(missing)} of {len(names)} are missing)")
    return [folder / name for name in names]


def _header_bytes(path: Path) -> int:
    """Return the length of a file's header; links are followed, as the Hugging Face cache uses them."""
    try:
        with open(path, "rb") as file:
            size, first = os.fstat(file.fileno()).st_size, file.read(8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        pointer = " (a Git LFS pointer: fetch the file itself)" if first == b"version " else ""
        raise InputError(f"{path}: is not a safetensors file: its header would not fit into it{pointer}")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {length:,}")
    return length


def _tensor(name: str, dtype: str, shape: list[int], path: Path) -> Tensor:
    where, tensor = f"{path}: tensor {_short(name)}", Tensor(dtype, tuple(shape))
    if len(name) > MAX_NAME:
        raise InputError(f"{where}: expected a name of at most {MAX_NAME} characters")
    if dtype not in BITS:
        raise InputError(f"{where}: dtype {dtype!r} is unknown")
    if len(shape) > MAX_AXES or tensor.elements > MAX_ELEMENTS:
        raise InputError(f"{where}: expected a shape of up to {MAX_AXES} sizes, got {one_line(repr(shape), 40)}")
    return tensor


def _short(name: str) -> str:
    return one_line(repr(name), 80)
