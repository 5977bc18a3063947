"""Configuration and tensors of a GGUF file by its header alone: :func:`read_gguf`.

The layout is that of gguf.h in https://github.com/ggml-org/llama.cpp: keys with values, then names and shapes of
tensors. Shapes only are read, of models named as a Llama is: no engine here has kernels for GGML's packed formats.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

from simulator.errors import InputError
from simulator.models.headers import MAX_ELEMENTS, MAX_NAME, MAX_TENSORS, Tensor

MAX_HEADER_BYTES = 32_000_000
"""Longest header that is read, the words of the tokenizer included: 256,000 take 10 MB."""

_FORMATS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # of values by type; 8 a string, 9 an array
_KEYS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
}  # fmt: skip
_LAYER = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in ("q", "k", "v", "qkv")}, "attn_output": "self_attn.o_proj",
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}, "attn_norm": "input_layernorm",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}, "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}


class _Bytes:
    """Values one after the other; struct.error or an InputError where there are no more."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4

    def one(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size, start = self.one("Q"), self.at
        self.at += size
        if self.at > len(self.data):
            raise struct.error
        return self.data[start : self.at].decode("utf-8", "replace") if size <= MAX_NAME else ""

    def value(self, kind: int) -> Any:
        """One value; of an array the numbers, of its texts none."""
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.one(_FORMATS[kind])
        inside, many = self.one("I"), self.one("Q")
        if inside == 8:
            for _ in range(many):
                self.text()
            return []
        size = struct.calcsize("<" + _FORMATS[inside])
        if not size or many * size > len(self.data) - self.at:
            raise struct.error
        start, self.at = self.at, self.at + many * size
        return list(struct.unpack_from(f"<{min(many, 100_000)}{_FORMATS[inside]}", self.data, start))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Content of a Hugging Face configuration, tensors under the names of one, and whether some are packed."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    source = _Bytes(data)
    try:
        version, tensors, keys = source.one("I"), source.one("Q"), source.one("Q")
        if data[:4] != b"GGUF" or version not in (2, 3) or tensors > MAX_TENSORS:
            raise InputError(f"{path}: is no GGUF file of version 2 or 3")
        said = {source.text(): source.value(source.one("I")) for _ in range(keys)}
        found, packed = _tensors(source, tensors)
    except (struct.error, IndexError, OverflowError, MemoryError):
        raise InputError(f"{path}: is no GGUF file: its header ends early or is longer than 32 MB") from None
    if "split.count" in said and said["split.count"] != 1:
        raise InputError(f"{path}: is one of {said['split.count']} files of a model; expected it in one file")
    kind = said.get("general.architecture")
    config = {key: said.get(f"{kind}.{name}") for key, name in _KEYS.items()}
    config = {key: max(v, default=None) if isinstance(v, list) else v for key, v in config.items() if v is not None}
    table = found.get("model.embed_tokens.weight")
    more = {"vocab_size": table.shape[0] if table and table.shape else None, "model_type": kind}
    return config | more | {"tie_word_embeddings": "lm_head.weight" not in found}, found, packed


def _tensors(source: _Bytes, many: int) -> tuple[dict[str, Tensor], bool]:
    found, packed = {}, False
    for _ in range(many):
        name, dimensions = source.text(), source.one("I")
        if dimensions > 4:
            raise struct.error
        shape = tuple(source.one("Q") for _ in range(dimensions))[::-1]
        kind, _ = source.one("I"), source.one("Q")
        if any(size > MAX_ELEMENTS for size in shape):
            raise struct.error
        packed |= kind not in (0, 1, 30)  # F32, F16, BF16
        if match := re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name):
            name = f"model.layers.{match[1]}.{_LAYER.get(match[2], match[2])}.{match[3]}"
        else:
            module, _, leaf = name.rpartition(".")
            name = f"{_OUTSIDE.get(module, module)}.{leaf}"
        if not name.startswith("rope_"):
            found[name] = Tensor("F16", shape)
    return found, packed
