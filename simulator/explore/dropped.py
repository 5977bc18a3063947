"""Encode dropped files as tokens that fit in a URL: a config.json, the headers of a checkpoint, or a hardware profile.

Use :func:`take` for the files of a drop, :func:`read_token` and :func:`read_profile` for a token. A token holds the
keys of a configuration that determine the shapes, for a checkpoint also the names and shapes of its tensors, and for a
profile its text. Decoded content is checked like any other file.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard, TypeVar

from simulator.errors import InputError, one_line
from simulator.files.json import parse_json
from simulator.hardware.library import hardware_from_text
from simulator.hardware.profile import HardwareProfile
from simulator.models.checkpoint import from_tensors
from simulator.models.config import ModelConfig
from simulator.models.headers import BITS, MAX_ELEMENTS, MAX_FILES, MAX_HEADERS_BYTES, MAX_NAME, MAX_TENSORS, Tensor
from simulator.models.huggingface import MAX_FILE_BYTES, from_file, parse_config

PREFIX = "dropped:"
"""Prefix of a token; no name of a model or device has it."""

MOST_TOKEN = 6000
"""Maximum length of a token, characters: browsers and proxies cut addresses above about 8000."""

MOST_FILES = MAX_FILES + 2
"""Maximum number of files of one drop: those of a checkpoint, their index and its config.json."""

MOST_PROFILE = 60_000
"""Maximum length of a dropped profile, bytes: reading this much YAML takes up to a third of a second."""

_MOST_JSON = 200_000

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,2})(?=\.)")
_INDEX = ".safetensors.index.json"

T = TypeVar("T")

Rows = Sequence[Sequence[Any]]
"""Tensors of a checkpoint in short form: name pattern, dtype, shape, and runs of the numbers in the pattern."""


@dataclass(frozen=True)
class Sent:
    """A file as the page sends it: its text, or the header of a ``*.safetensors`` and the number of bytes after it."""

    name: str  # with the name of the dropped folder, if any
    text: str
    room: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why a token was refused: cached like the content of others, because a page reads each token several times."""

    reason: str


class _Noted(Mapping[str, Any]):
    """A configuration that records which of its keys are read, also of mappings inside."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.seen: dict[str, Any] = {}
        self.inside: dict[str, _Noted] = {}

    def __getitem__(self, key: str) -> Any:
        value = self.data[key]
        if isinstance(value, Mapping) and value:
            value = self.inside.setdefault(key, _Noted(value))
            self.seen[key] = value.seen
        else:
            self.seen[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


# -- files to tokens ---------------------------------------------------------------------------------------------------


def take(files: Sequence[Sent]) -> tuple[str, str]:
    """Return the kind of the files of one drop, "gpu" or "model", and their token; InputError, one line, for others.

    >>> take([Sent("model.safetensors", "{}")])
    Traceback (most recent call last):
    simulator.errors.InputError: model.safetensors: expected the config.json of its folder too
    """
    if len(files) > MOST_FILES:
        raise InputError(f"{len(files)} files: expected at most {MOST_FILES}")
    first = _file_name(files[0].name) if files else "nothing"
    if len(files) == 1 and first.lower().endswith((".yaml", ".yml")):
        return "gpu", profile_token(files[0].text, first)
    tensors, index, others = list[Sent](), list[Sent](), list[Sent]()
    for f in files:
        kind = tensors if f.name.endswith(".safetensors") else index if f.name.endswith(_INDEX) else others
        kind.append(f)
    if len(others) > 1:
        others = [f for f in others if _file_name(f.name) == "config.json"]
    if len(others) != 1:
        alone = f"{first}: expected the config.json of its folder too"
        right = "expected one config.json, with or without the *.safetensors of its folder"
        raise InputError(alone if len(files) == 1 else f"{len(files)} files: {right}")
    (config,) = others
    if not tensors and not index:
        return "model", token(config.text, config.name)
    folder = PurePosixPath(config.name).parent.name or "."
    if len(index) > 1:
        raise InputError(f"{folder}: expected at most one *{_INDEX}, got {len(index)}")
    for f in index:
        names = indexed(f.text.encode("utf-8", "replace"), Path(_file_name(f.name)))
        check_there(Path(folder), names, [_file_name(t.name) for t in tensors])
        there = set(names)
        tensors = [t for t in tensors if _file_name(t.name) in there]
    headers = ((Path(_file_name(t.name)), t.text.encode("utf-8", "replace"), t.room) for t in tensors)
    return "model", token(config.text, config.name, join_headers(Path(folder), headers))


def token(text: str, file: str, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Return the token of a config.json with content ``text`` and name ``file``; if the ``tensors`` of its checkpoint
    are given, the token holds the name of the folder instead.

    InputError, one line that starts with the file's name: too large, not JSON, invalid fields, or too long a token.

    >>> tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> tiny |= {"num_attention_heads": 2, "vocab_size": 10, "torch_dtype": "bfloat16"}
    >>> read_token(token(json.dumps(tiny), "tiny.json"))[1].parameters
    824
    """
    path = PurePosixPath(file.replace("\\", "/"))
    name = _file_name(file) if tensors is None else one_line(path.parent.name, 100) or "."
    label = _file_name(file)
    if len(text.encode("utf-8", "replace")) > MAX_FILE_BYTES:
        raise InputError(f"{label}: larger than {MAX_FILE_BYTES} bytes; expected a config.json")
    data = parse_config(text.removeprefix("\ufeff"), label)
    noted = _Noted(data if isinstance(data, Mapping) else {})
    from_file(noted if isinstance(data, Mapping) else data, PurePosixPath(label))
    # the name of modelling code is no shape, and an address carries shapes only
    shapes = {key: value for key, value in noted.seen.items() if key != "auto_map" and value != {}}
    content: dict[str, Any] = {"file": name, "config": shapes}
    if tensors is not None:
        content["tensors"] = _short(tensors)
        _model(content)
    return _packed(content, label, "shapes")


def profile_token(text: str, file: str) -> str:
    """Return the token of a hardware profile without arrays."""
    if len(text.encode("utf-8", "replace")) > MOST_PROFILE:
        raise InputError(f"{file}: larger than {MOST_PROFILE} bytes; expected a hardware profile")
    text = text.removeprefix("\ufeff")
    hardware_from_text(text, file)
    return _packed({"file": file, "profile": text}, file, "facts")


def _file_name(path: str) -> str:
    return one_line(PurePosixPath(path.replace("\\", "/")).name, 100) or "config.json"


def _packed(content: Mapping[str, Any], file: str, part: str) -> str:
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
    out = PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    if len(out) > MOST_TOKEN:
        raise InputError(f"{file}: its {part} need {len(out)} characters, but an address holds at most {MOST_TOKEN}")
    return out


def _short(tensors: Mapping[str, Tensor]) -> Rows:
    """Return tensors in short form: tensors that differ in at most two numbers of their names share a row."""
    groups: dict[Any, dict[int, list[int]]] = {}
    for name, tensor in tensors.items():
        numbers = [int(n) for n in _NUMBER.findall(name)[:2]]
        if "#" in name:
            raise InputError(f"tensor {one_line(repr(name), 80)}: expected a name without #")
        pattern = _NUMBER.sub("#", name, count=2)
        first, *rest = *numbers, *[-1] * (2 - len(numbers))
        groups.setdefault((pattern, tensor.dtype, tensor.shape), {}).setdefault(first, []).extend(rest)
    rows: dict[Any, list[int]] = {}
    for key, numbered in groups.items():
        for first, seconds in numbered.items():
            rows.setdefault((key, tuple(_runs(sorted(seconds)))), []).append(first)
    return [
        [pattern, dtype, [*shape], _runs(sorted(firsts)), [*seconds]]
        for ((pattern, dtype, shape), seconds), firsts in rows.items()
    ]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last number of each run of sorted numbers.

    >>> _runs([0, 4, 5, 6])
    [(0, 0), (4, 6)]
    """
    groups = (list(run) for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]))
    return [(run[0][1], run[-1][1]) for run in groups]


# -- tokens to content -------------------------------------------------------------------------------------------------


def read_token(text: str) -> tuple[str, ModelConfig]:
    """Return the file name of a token (of a checkpoint its folder's, "." if unknown) and its model; InputError for a
    token that :func:`token` did not make.

    >>> read_token("dropped:x")
    Traceback (most recent call last):
    simulator.errors.InputError: model 'dropped:x': not a dropped config.json that can be read
    """
    return _accepted(_model_or_refusal(text))


def read_profile(text: str) -> tuple[str, HardwareProfile]:
    """Return the file name and the profile of a token."""
    return _accepted(_profile_or_refusal(text))


def _accepted(found: tuple[str, T] | Refusal) -> tuple[str, T]:
    if isinstance(found, Refusal):
        raise InputError(found.reason)
    return found


@lru_cache(maxsize=32)
def _model_or_refusal(text: str) -> tuple[str, ModelConfig] | Refusal:
    broken = InputError(f"model {one_line(text, 40)!r}: not a dropped config.json that can be read")
    try:
        return _model(_content(text, broken))
    except InputError as error:
        return Refusal(str(error))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return Refusal(str(broken))


@lru_cache(maxsize=32)
def _profile_or_refusal(text: str) -> tuple[str, HardwareProfile] | Refusal:
    broken = InputError(f"GPU {one_line(text, 40)!r}: not a dropped profile that can be read")
    try:
        content = _content(text, broken)
        name, profile = content.get("file"), content.get("profile")
        if not isinstance(name, str) or not isinstance(profile, str) or len(profile) > MOST_PROFILE:
            raise broken
        return _file_name(name), hardware_from_text(profile, _file_name(name))
    except InputError as error:
        return Refusal(str(error))


def path_of(text: str) -> str:
    """Return the path of a token's file or folder, relative to the current folder."""
    name = _content(text, InputError("not a token"))["file"]
    return "." if name == "." else f"./{_file_name(name)}"


def _content(text: str, broken: InputError) -> dict[str, Any]:
    packed = text.removeprefix(PREFIX)
    if len(text) > MOST_TOKEN:
        raise broken
    try:
        unpack = zlib.decompressobj()
        raw = unpack.decompress(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)), _MOST_JSON)
        content = json.loads(raw)
    except (ValueError, zlib.error, RecursionError):
        raise broken from None
    if not unpack.eof or not isinstance(content, dict):
        raise broken
    return content


def _model(content: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    name, rows = content["file"], content.get("tensors")
    if not isinstance(name, str):
        raise TypeError
    if rows is None:
        name = _file_name(name)
        return name, from_file(content["config"], PurePosixPath(name))
    name = "." if name == "." else _file_name(name)
    model = from_file(content["config"], PurePosixPath(name) / "config.json")
    return name, from_tensors(model, _tensors(rows), "checkpoint" if name == "." else name)


def _tensors(rows: Rows) -> dict[str, Tensor]:
    """Return the tensors of rows that :func:`_short` made."""
    found: dict[str, Tensor] = {}
    left = MAX_TENSORS
    for pattern, dtype, shape, firsts, seconds in rows:
        tensor = checked(dtype, shape, f"tensor {one_line(str(pattern), 80)}")
        parts, numbers = pattern.split("#"), (_numbers(firsts), _numbers(seconds))
        left -= len(numbers[0]) * len(numbers[1])
        if left < 0 or len(parts) > 3:
            raise ValueError
        for pair in itertools.product(*numbers):
            given = [*map(str, pair[: len(parts) - 1]), "", ""]
            found["".join(part + number for part, number in zip(parts, given))] = tensor
    return found


def _numbers(runs: Iterable[Sequence[int]]) -> list[int]:
    every = itertools.chain.from_iterable(range(first, last + 1) for first, last in runs)
    return list(itertools.islice(every, 1000))


MAX_MARKS = 600_000


def join_headers(folder: Path, files: Iterable[tuple[Path, bytes, int]]) -> dict[str, Tensor]:
    """Return the tensors of files by name; a file is its path, its header, and the number of bytes after the header."""
    found: dict[str, Tensor] = {}
    room = MAX_HEADERS_BYTES
    for file, content, data in files:
        if (room := room - len(content)) < 0:
            raise InputError(f"{folder}: expected headers of at most {MAX_HEADERS_BYTES / 1e6:g} MB together")
        for name, tensor in _header_tensors(content, data, file):
            if name in found:
                raise InputError(f"{file}: tensor {_quoted_name(name)} is in another file too")
            found[name] = tensor
        if len(found) > MAX_TENSORS:
            raise InputError(f"{folder}: expected at most {MAX_TENSORS:,} tensors, got more")
    return found


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
        many = f"{len(missing)} of {len(names)} are missing"
        raise InputError(f"{folder}: {_quoted_name(missing[0])} is missing ({many})")


def _header_tensors(header: bytes, room: int, path: Path) -> Iterator[tuple[str, Tensor]]:
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
            raise InputError(f"{path}: tensor {_quoted_name(name)}: its bytes overlap those of another tensor")
        if start > end:
            place = f"{path}: tensor {_quoted_name(name)}"
            raise InputError(f"{place}: expected its bytes to start at {end:,}, after those before it, got {start:,}")
        end = stop
        yield name, tensor
    if end < room:
        raise InputError(f"{path}: expected tensors of all {room:,} bytes after the header, got tensors of {end:,}")


def _entry(path: Path, name: str, value: Any, room: int) -> tuple[Tensor, int, int]:
    """Return a tensor, and start and end of its bytes."""
    where = f"{path}: tensor {_quoted_name(name)}"
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


def _quoted_name(name: str) -> str:
    return one_line(repr(name), 80)
