"""A checkpoint's tensors against its config.json, by headers alone; what is no safetensors file is refused."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.models.headers import BITS, MAX_HEADER_BYTES, read_headers
from simulator.models.library import FOLDER, load_model

Shapes = Mapping[str, tuple[int, ...]]


def save(path: Path, shapes: Shapes, dtype: str = "F16") -> None:
    """A safetensors file whose weights are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    write(path, json.dumps(header | {"__metadata__": {"format": "pt"}}).encode(), end)


def write(path: Path, header: bytes, room: int = 0, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    os.truncate(path, 8 + len(header) + room)


def folder_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / "config.json").write_bytes((FOLDER / f"{name}.json").read_bytes())
    return tmp_path


def llama(inner: Mapping[int, int] = {}, layers: int = 32) -> dict[str, tuple[int, ...]]:
    """Tensors of Llama-2-7B, with an MLP of another width in some layers."""
    found = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for i in range(layers):
        width, at = inner.get(i, 11008), f"model.layers.{i}."
        found |= {f"{at}self_attn.{x}_proj.weight": (4096, 4096) for x in "qkvo"}
        found |= {f"{at}mlp.{x}_proj.weight": (width, 4096) for x in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (4096, width), f"{at}input_layernorm.weight": (4096,)}
        found |= {f"{at}post_attention_layernorm.weight": (4096,), f"{at}self_attn.rotary_emb.inv_freq": (64,)}
    return found


def test_a_checkpoint_that_is_what_its_config_says_is_read(tmp_path: Path) -> None:
    folder, shapes = folder_of(tmp_path, "llama-2-7b"), llama()
    save(folder / "model.safetensors", shapes)
    assert load_model(folder).parameters == 6_738_415_616
    (folder / "model.safetensors").unlink()
    names = list(shapes)
    parts = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for file, inside in parts.items():
        save(folder / file, {name: shapes[name] for name in inside})
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save(folder / "left-over.safetensors", {"x.layers.0.weight": (1,)})  # not in the index
    assert load_model(str(folder)).parameters == 6_738_415_616
    assert read_headers(folder).keys() == shapes.keys()


@pytest.mark.parametrize(
    ("inner", "layers", "says"),
    [
        (dict.fromkeys(range(4, 30), 3328), 32, "layers 4-29 hold 108,011,520 parameters each, 202,383,360 by"),
        (dict.fromkeys(range(4, 30), 3328), 32, "mlp.gate_proj.weight is 3328 x 4096, not 11008 x 4096"),
        ({0: 64, 7: 128}, 32, "layers 0, 7 hold 67,903,488 to 68,689,920 parameters each"),
        (dict.fromkeys(range(32), 8810), 32, "layers 0-31 hold 175,374,336 parameters each, 202,383,360 by"),
        ({}, 24, "layers 24-31 are missing"),
        ({}, 33, "layers 32 hold 202,383,360 parameters each"),
        ({3: 64}, 31, "layers 3 hold .* and layers 31 are missing"),
    ],
)
def test_a_pruned_checkpoint_is_not_taken_for_a_dense_one(
    tmp_path: Path, inner: dict[int, int], layers: int, says: str
) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    save(folder / "model.safetensors", llama(inner, layers))
    with pytest.raises(InputError, match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert load_model(folder / "config.json").parameters == 6_738_415_616  # asked for alone


def test_packed_weights_are_not_looked_into_and_an_adapter_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    gptq = {f"model.layers.{i}.mlp.down_proj.qweight": (1376, 4096) for i in range(32)}
    save(folder / "model.safetensors", gptq | {"model.layers.0.input_layernorm.weight": (4096,)}, "I32")
    assert load_model(folder).parameters == 6_738_415_616
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match=r"no config\.json; it holds a PEFT adapter: merge it"):
        load_model(folder)


def entry(**changes: Any) -> bytes:
    value = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]} | changes
    return json.dumps({"a": value}).encode()


TWO = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "length", "says"),
    [
        (b"", 2**60, "its header would not fit"),
        (b"version https://git-lfs.github.com/spec/v1", 0x206E6F6973726576, "Git LFS pointer"),
        (b" " * (MAX_HEADER_BYTES + 1), None, "header of 8,000,001 bytes"),
        (b"{" * 100_000, None, "not JSON"),
        (b"[" * 1_000_000, None, "holds more than"),
        (b'{"a": [' + b"0," * 10**6 + b"0]}", None, "holds more than"),
        (b"[]", None, "no JSON object"),
        (b'{"a": 1}', None, "expected dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F16", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', None, "not JSON"),
        (entry(dtype="F17"), None, "dtype 'F17' is unknown"),
        (entry(dtype=["F16"]), None, "is unknown"),
        (entry(shape=[-2, -2]), None, "expected a shape"),
        (entry(shape=[2.0, 2]), None, "expected a shape"),
        (entry(shape=[True, 4]), None, "expected a shape"),
        (entry(shape=[2**40, 2**40]), None, "expected a shape"),
        (entry(shape=[1] * 9), None, "expected a shape"),
        (entry(shape=[3, 2]), None, "other bytes than its shape"),
        (entry(data_offsets=[8, 0]), None, "outside the file"),
        (entry(data_offsets=[0, 2**50]), None, "outside the file"),
        (entry(data_offsets=[-8, 0]), None, "outside the file"),
        (json.dumps({"a": TWO, "b": TWO | {"data_offsets": [2, 6]}}).encode(), None, "overlap"),
    ],
)
def test_hostile_headers_are_refused_in_one_line(tmp_path: Path, header: bytes, length: int | None, says: str) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    write(folder / "model.safetensors", header, 8 if header.startswith(b"{") else 0, length)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=says) as caught:
            load_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "weight_map: expected a file name"),
        (b'{"weight_map": {}}', "weight_map: expected a file name"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "names of files in this folder"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "names of files in this folder"),
        (b'{"weight_map": {"a": ".."}}', "names of files in this folder"),
        (b'{"weight_map": {"a": 3}}', "names of files in this folder"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors' is missing"),
        (b'{"weight_map": {"a": "dir.safetensors"}}', "is missing"),
        (json.dumps({"weight_map": {str(i): f"{i}" for i in range(5000)}}).encode(), "5,000 safetensors files"),
        (b" " * 17_000_000, "is larger than 16 MB"),
    ],
)
def test_hostile_indices_are_refused_in_one_line(tmp_path: Path, index: bytes, says: str) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    (folder / "dir.safetensors").mkdir()
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(InputError, match=says):
        load_model(folder)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 400))
@example([(7, 255)], 400)
def test_damaged_headers_are_read_or_refused(tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    file = tmp_path / "model.safetensors"
    save(file, {"model.layers.0.mlp.up_proj.weight": (4, 8), "model.layers.0.norm.weight": (4,), "head": ()})
    content = bytearray(file.read_bytes())
    for at, byte in edits:
        content[at % len(content)] = byte
    file.write_bytes(bytes(content[: cut or None]))
    with contextlib.suppress(InputError):  # its one line is printable by construction; any other error fails
        found = read_headers(tmp_path)
        assert all(math.prod(t.shape) * BITS[t.dtype] // 8 <= len(content) for t in found.values())
