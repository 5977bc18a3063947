"""Read a model from the headers of its ``*.safetensors``, names, dtypes and shapes, not weights:
:func:`read_headers`, then :func:`from_tensors`.

:func:`read_headers` limits every size that a file states before it reads on, and pickles are
rejected, since they can run code. The axes of each named tensor (:func:`axes_of`) are widths of its
layer. Tensors must agree on each width, and the resulting model must have exactly the number of
parameters in the headers.

Names are those in Transformers, except for two methods: a low-rank projection is stored as its two
factors (SVD-LLM's ``q_u_proj`` and ``q_v_proj``, ASVD's ``q_proj.ALinear`` and ``q_proj.BLinear``),
and SliceGPT stores the matrices that rotate its residual stream (``attn_shortcut_Q``,
``mlp_shortcut_Q``). :func:`logical` finds shape and format of a packed projection: GPTQ and AWQ
(``qweight``), compressed-tensors (``weight_packed``, for 2:4 ``compressed`` and ``bitmask``), 8-bit
floats with scales, bitsandbytes (``absmax``), ModelOpt, and MXFP4 of gpt-oss
(``blocks``).

Tensors of architectures outside :data:`NAMED` are only counted: each layer must have the number of
parameters that its configuration states.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from simulator.codes import Part
from simulator.display import runs
from simulator.errors import InputError, one_line
from simulator.files.read import parse_bounded, read_bounded
from simulator.models.difference import difference
from simulator.models.form import PLAIN, Form
from simulator.models.model import PART_NAMES, Layer, Model
from simulator.models.pass_rows import COMPRESSED
from simulator.models.quantization import FORMATS
from simulator.models.sublayers import (
    Attention,
    DeltaNet,
    Experts,
    LatentAttention,
    Linear,
    Mlp,
    SharedCacheAttention,
)
from simulator.models.sublayers.base import Sublayer
from simulator.models.tables import read_names

# headers of one file; a shard of DeepSeek-V3 with 560 tensors has 60 kB
MAX_HEADER_BYTES = 8_000_000
MAX_HEADERS_BYTES = 24_000_000  # headers of all files; DeepSeek-V3 has 10 MB
MAX_INDEX_BYTES = 16_000_000  # DeepSeek-V3 with 91,000 tensors has 9 MB
MAX_FILES = 4_096
MAX_TENSORS = 150_000
MAX_ELEMENTS = 2**44
MAX_NAME = 400
MAX_AXES = 8

_DTYPES = (
    "F4 F6_E2M3 F6_E3M2 U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64"
)
BITS = {"BOOL": 8} | {name: int(re.split(r"[A-Z]+|_", name)[1]) for name in _DTYPES.split()}
"""Bits of an element of each dtype."""

_PICKLE = re.compile(
    r"(?:pytorch_model|model|consolidated|checkpoint)\b.*\.(?:bin|pt|pth)|pytorch_model.*\.bin"
)


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name, from the files in its index or else all its
    ``*.safetensors``."""
    found: dict[str, Tensor] = {}
    room = MAX_HEADERS_BYTES
    for path in _files(folder):
        room -= _header_bytes(path)
        if room < 0:
            raise InputError(
                f"{folder}: expected headers of at most {MAX_HEADERS_BYTES / 1e6:g} MB together"
            )
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
            raise InputError(
                f"{path}: is not a safetensors file: {one_line(reason, 160)}; {again}"
            ) from None
        if len(found) > MAX_TENSORS:
            raise InputError(f"{folder}: expected at most {MAX_TENSORS:,} tensors, got more")
    if not found and (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: it holds a PEFT adapter: merge it into its base model first")
    pickles = sorted(p.name for p in folder.iterdir() if _PICKLE.fullmatch(p.name))
    if pickles and not found:
        right = (
            "save the model as safetensors (save_pretrained, safetensors.torch.save_model) or give"
            " only config.json"
        )
        raise InputError(
            f"{folder}: {_short(pickles[0])} is a pickle, which is never opened: {right}"
        )
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        parsed = parse_bounded(read_bounded(index, MAX_INDEX_BYTES), str(index), MAX_INDEX_BYTES)
        entries = parsed.get("weight_map") if isinstance(parsed, dict) else None
        if not isinstance(entries, dict) or not entries:
            raise InputError(f"{index}: weight_map: expected a file name for each tensor")
        values = entries.values()
        if any(
            not isinstance(v, str) or v in (".", "..") or os.path.basename(v) != v or "\0" in v
            for v in values
        ):
            raise InputError(f"{index}: weight_map: expected names of files in this folder")
        names = sorted(set(values))
    else:
        names = sorted(
            p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_")
        )
    if len(names) > MAX_FILES:
        raise InputError(
            f"{folder}: expected at most {MAX_FILES:,} safetensors files, got {len(names):,}"
        )
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        there = os.path.lexists(folder / missing[0])  # a pipe, a device or a link to nothing
        what = "is not a file that can be read" if there else "is missing"
        raise InputError(
            f"{folder}: {_short(missing[0])} {what} ({len(missing)} of {len(names)} files cannot"
            " be read)"
        )
    return [folder / name for name in names]


def _header_bytes(path: Path) -> int:
    """Return the length of a file's header; links are followed, as the Hugging Face cache uses
    them."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        pointer = " (a Git LFS pointer: fetch the file itself)" if first == b"version " else ""
        raise InputError(
            f"{path}: is not a safetensors file: its header would not fit into it{pointer}"
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {length:,}"
        )
    return length


def _tensor(name: str, dtype: str, shape: list[int], path: Path) -> Tensor:
    where = f"{path}: tensor {_short(name)}"
    tensor = Tensor(dtype, tuple(shape))
    if len(name) > MAX_NAME:
        raise InputError(f"{where}: expected a name of at most {MAX_NAME} characters")
    if dtype not in BITS:
        raise InputError(f"{where}: dtype {dtype!r} is unknown")
    if len(shape) > MAX_AXES or tensor.elements > MAX_ELEMENTS:
        raise InputError(
            f"{where}: expected a shape of up to {MAX_AXES} sizes, got {one_line(repr(shape), 40)}"
        )
    return tensor


def _short(name: str) -> str:
    return one_line(repr(name), 80)


# names of the part that holds the weight itself; the first that exists is used
WEIGHTS = ("weight", "qweight", "weight_packed", "compressed", "blocks")

# last parts of the names of tensors that belong to one projection
_PARTS = (
    rf"{'|'.join(WEIGHTS)}|weight_(?:scale|scale_inv|scale_2|zero_point|g_idx|shape|global_scale|format)|bias|qzeros|"
    r"scales|g_idx|perm|bitmask|row_offsets|shape|input_scale|input_global_scale|input_zero_point|"
    r"output_scale|k_scale|v_scale|SCB|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.bitsandbytes__\w+"
)
NAME = re.compile(
    r"(?:(?:_orig_mod|base_model|language_model|model|decoder|gpt_neox)\.)*(?:layers\.(\d{1,5})\.)?"
    rf"(.+?)(?:(?:\.weight)?\.({_PARTS})|_(blocks|scales))?"
)
BUFFER = re.compile(r"(?:.*[._])?(?:rotary_emb|inv_freq|masked_bias|layer_scalar)(?:\..*)?")

# Axes of a weight: h hidden size, q and kv width of queries and keys, o inputs of the output
# projection, i and e inner widths of MLP and experts, E experts, V vocabulary, P positions; 2i is
# twice i. A bias has the first axis. "out" are the outputs of an MLP, and H the inputs of the head:
# both are h except in the last layer of SliceGPT. A gated delta net has values, channels of its
# convolution, conv positions, delta heads, and features of a value head.
ATTENTION = r"(?:self_attn|attention|attn)\."
MLP = r"(?:(?:mlp|feed_forward)\.(?:shared_experts?\.)?)?"
ROUTED = r"(?:mlp|block_sparse_moe|feed_forward)\."
EXPERT = ROUTED + r"experts\.\d{1,5}\."
EXPERTS = ROUTED + r"experts\."
_PREFIXES = {
    "attention": ATTENTION,
    "delta": r"linear_attn\.",
    "mlp": MLP,
    "": "",
    "routed": ROUTED,
    "expert": EXPERT,
    "experts": EXPERTS,
}
_NAMES = read_names("tensors")

Axes = Sequence[tuple[re.Pattern[str], tuple[str, ...]]]


def _axes(prefix: str, names: Mapping[str, str]) -> Axes:
    """Return the axes of names with a prefix."""
    return [(re.compile(prefix + name), tuple(axes.split())) for name, axes in names.items()]


LAYER: Axes = [
    pair for kind, names in _NAMES["layer"].items() for pair in _axes(_PREFIXES[kind], names)
]
OUTSIDE = _axes("", _NAMES["outside"])
WIDE = re.compile(r".*(?:norm|router|\bgate|shared_expert_gate|sinks|bias|in_proj_ba|conv1d|A_log)")
"""Weights in the format of the residual stream."""

_FACTOR = re.compile(r"(?:(.*\.)?([qkvo]|gate|up|down)_([uv])_proj|(.+)\.([AB])Linear)")
_ROLES: Mapping[str, str] = _NAMES["roles"]


def factor_of(module: str) -> tuple[str, str, bool]:
    """Return the projection of a factor, its role ("" for no factor), and whether it makes the
    projection's outputs."""
    match = _FACTOR.fullmatch(module) if module.endswith(("_u_proj", "_v_proj", "Linear")) else None
    if match is None:
        return module, "", False
    inside, name, half, base, letter = match.groups()
    if base is None:
        return f"{inside or ''}{name}_proj", name, half == "u"
    return base, _ROLES.get(base.rsplit(".", 1)[-1], ""), letter == "A"


def axes_of(module: str, table: Axes) -> tuple[str, ...]:
    """Return the axes of a module's weight, none for an unknown name; the rank of a factor is "rank
    " and its role."""
    base, role, makes = factor_of(module)
    axes = next((axes for pattern, axes in table if pattern.fullmatch(base)), ())
    if not role:
        return axes if base == module else ()
    if len(axes) != 2 or re.match(EXPERT, base):
        return ()
    return (axes[0], f"rank {role}") if makes else (f"rank {role}", axes[1])


FLOATS = ("F64", "F32", "F16", "BF16")
_8_BIT = ("F8_E4M3", "F8_E5M2")
_INTS = {4: "int4", 8: "int8"}


@dataclass(frozen=True, slots=True)
class Weight:
    shape: tuple[int, ...]  # (outputs, inputs); experts in one tensor: (experts, inputs, outputs)
    dtype: str = ""  # stored format; "" for floats of 16 bits and more
    sparse24: bool = False


def logical(
    parts: Mapping[str, Tensor], inputs: int = 0, outputs: int = 0, bits: int = 0
) -> Weight:
    """Return the weight of a projection, given its parts by the last part of their names;
    ValueError if unknown.

    ``inputs`` and ``outputs`` are its widths, 0 if unknown, and ``bits`` the bits of packed
    integers: headers do not contain the padding of packed rows, the shape in bitsandbytes, and the
    bits in compressed-tensors."""
    name = next((name for name in WEIGHTS if name in parts), "")
    if not name:
        raise ValueError("has no weight")
    stored = parts[name]
    shape = stored.shape
    dtype = stored.dtype
    if name == "blocks" and len(shape) == 4:  # (experts, outputs, groups, bytes per group)
        return Weight((shape[0], shape[2] * shape[3] * 2, shape[1]), "mxfp4")
    if name == "weight" and "absmax" in parts:
        elements = stored.elements * 2
        known = inputs or outputs
        if not known or elements % known:
            raise ValueError(f"has {elements:,} elements, which do not match its known widths")
        return Weight((elements // known, known) if inputs else (known, elements // known), "int4")
    if name == "weight" and dtype in FLOATS:
        return Weight(shape)
    mask = _shape(parts, "bitmask")
    if name == "compressed" and len(mask) == 2:  # one row of bits per output, padded to bytes
        width = inputs if -(-inputs // 8) == mask[1] else mask[1] * 8
        return Weight((mask[0], width), _float(dtype), shape == (mask[0], width // 2))
    if len(shape) == 2:
        rows, columns = shape
        if name == "weight":
            return Weight((rows, 2 * columns) if dtype == "U8" else shape, _scaled(parts, dtype))
        if name == "weight_packed" and dtype == "U8":
            return Weight(
                (rows, 2 * columns), "nvfp4" if "weight_global_scale" in parts else "mxfp4"
            )
        if name == "weight_packed":
            width = inputs if -(-inputs * bits // 32) == columns else columns * 32 // max(bits, 1)
            return Weight((rows, width), _integer(bits, 1))
        if name == "qweight":
            return _by_scales(shape, parts)
    raise ValueError(
        f"is stored as {name} of {dtype} in {len(shape)} dimensions, an unknown layout"
    )


def _shape(parts: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return parts[name].shape if name in parts else ()


def _float(dtype: str) -> str:
    if dtype in FLOATS or dtype in _8_BIT:
        return "fp8" if dtype in _8_BIT else ""
    raise ValueError(f"is stored as {dtype}, an unknown layout")


def _scaled(parts: Mapping[str, Tensor], dtype: str) -> str:
    scale = _shape(parts, "weight_scale_inv") or _shape(parts, "weight_scale")
    if dtype in _8_BIT:
        # ModelOpt stores scales of blocks in four dimensions
        return "fp8_block" if any(size > 1 for size in scale[1:]) else "fp8"
    if dtype == "I8" and (scale or "SCB" in parts):
        return "int8"
    if dtype == "U8" and "weight_scale_2" in parts:
        return "nvfp4"
    return _float(dtype)


def _integer(bits: int, per: int) -> str:
    if not per or bits % per or bits // per not in _INTS:
        raise ValueError("expected integers of 4 or 8 bits, as no cost model has others")
    return _INTS[bits // per]


def _by_scales(shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> Weight:
    """Return a GPTQ or AWQ weight: elements of 32 bits pack inputs (GPTQ) or outputs (AWQ)."""
    rows, columns = shape
    scales, zeros, order = (_shape(parts, name) for name in ("scales", "qzeros", "g_idx"))
    if len(scales) != 2:
        raise ValueError("has no scales for each output")
    out = scales[1]
    if columns != out:
        return Weight((out, rows), _integer(32 * columns, out))
    if len(order) == 1:  # the group of each input
        return Weight((out, order[0]), _integer(32 * rows, order[0]))
    bits = 32 * zeros[1] // out if len(zeros) == 2 else 4
    stored = _integer(bits, 1)  # refuses 0 bits
    return Weight((out, rows * 32 // bits), stored)


NAMED = frozenset(_NAMES["named"])
"""Architectures whose tensors have the names in :data:`LAYER` and :data:`OUTSIDE`."""

MAX_WIDTH = 10_000_000
# sublayer -> name of the matrix with which SliceGPT rotates its residual
SHORTCUTS = {"attention": "attn_shortcut_Q", "mlp": "mlp_shortcut_Q"}
_MXFP4 = ("mxfp4", False)  # only routed experts have this format


@dataclass
class _Part:
    """Tensors of one layer, or outside the layers (number -1)."""

    where: str
    number: int
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # width -> a tensor with it
    # format -> a tensor stored in it
    formats: dict[tuple[str, bool], str] = field(default_factory=dict)
    biases: set[str] = field(default_factory=set)  # modules with a bias
    parameters: int = 0

    def name(self, module: str) -> str:
        inside = f"layers.{self.number}.{module}" if self.number >= 0 else module
        return f"{self.where}: tensor {one_line(inside, 80)}"

    def put(self, width: str, size: int, name: str) -> None:
        """Set one width; raise InputError if another tensor of the layer has a different one."""
        if width.startswith("2"):
            if size % 2:
                raise InputError(f"{name}: expected two halves, got {size:,}")
            width = width[1:]
            size = size // 2
        if size > MAX_WIDTH:
            raise InputError(f"{name}: expected widths up to {MAX_WIDTH:,}, got {size:,}")
        if (known := self.widths.setdefault(width, size)) != size:
            other = self.names.get(width, "the embedding or the number of experts").rsplit(
                "tensor "
            )[-1]
            raise InputError(f"{name}: expected a width of {known:,}, as in {other}, got {size:,}")
        self.names.setdefault(width, name)

    def read(self) -> None:
        table = LAYER if self.number >= 0 else OUTSIDE
        bits = 0  # bits of packed integers, as a weight that reads the residual stream shows
        found = {module: axes_of(module, table) for module in self.modules}
        fused = any(axes[0] == "E" for axes in found.values() if len(axes) == 3)
        count = len({m.split(".experts.")[1].split(".")[0] for m in found if re.match(EXPERT, m)})
        if count and not fused:
            self.put("E", count, f"{self.where}: layer {self.number}")
        # weights whose inputs are the hidden size come first: some packed layouts need the widths
        # of these weights
        for module, axes in sorted(
            found.items(), key=lambda item: len(item[1]) == 2 and item[1][1] != "h"
        ):
            parts = self.modules[module]
            name = self.name(module)
            if not axes:
                if not (parts.keys() & {*WEIGHTS, "bias"}):
                    continue  # scales of a cache
                raise InputError(
                    f"{name}: belongs to no known layer; expected a merged model without further"
                    " weights"
                )
            packed = parts.get("weight_packed")
            if packed is not None and axes[1:] == ("h",) and len(packed.shape) == 2:
                columns = packed.shape[1]
                fits = (b for b in _INTS if columns == -(-self.widths["h"] * b // 32) > 0)
                bits = next(fits, bits)
            try:
                weight = logical(
                    parts, self.widths.get(axes[-1], 0), self.widths.get(axes[0], 0), bits
                )
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            if len(weight.shape) != len(axes):
                raise InputError(
                    f"{name}: expected {len(axes)} dimensions, got {len(weight.shape)}"
                )
            self.take(module, axes, weight, parts.get("bias"))

    def take(self, module: str, axes: tuple[str, ...], weight: Weight, bias: Tensor | None) -> None:
        name = self.name(module)
        size = 1
        for width, length in zip(axes, weight.shape):
            self.put(width, length, name)
            size *= length
        self.parameters += size
        if not WIDE.fullmatch(module) and module not in ("embed_tokens", "embed_in"):
            self.formats.setdefault((weight.dtype, weight.sparse24), name)
        if bias is not None:
            if bias.shape != weight.shape[:1] or bias.dtype not in FLOATS:
                raise InputError(
                    f"{name}.bias: expected {weight.shape[0]:,} floats, one per output"
                )
            self.biases.add(module)
            self.parameters += bias.elements

    def unstated(self, kind: str) -> InputError:
        return InputError(f"{self.where}: layer {self.number} has {kind}, its config.json none")

    def divided(self, width: str, by: int, what: str, size: int | None = None) -> int:
        """Return how many times ``by`` makes a width, or a ``size`` that follows from it."""
        if width not in self.widths:
            without = f"has attention without its {width} projection"
            raise InputError(f"{self.where}: layer {self.number} {without}")
        size = self.widths[width] if size is None else size
        if by <= 0 or size < 0 or size % by:
            raise InputError(
                f"{self.names[width]}: expected a multiple of {what} {by:,}, got {size:,}"
            )
        return size // by

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, module) for module in self.modules)


def from_tensors(model: Model, tensors: Mapping[str, Tensor], folder: str | Path) -> Model:
    """Return the model in a checkpoint: widths, layers and formats of its tensors replace those of
    its configuration. :attr:`Model.found` reports the differences."""
    if model.architecture not in NAMED:
        return _counted(model, tensors, str(folder))
    outside, layers, ignored = _sorted(model, tensors, str(folder))
    if not layers:
        raise InputError(
            f"{folder}: expected layers with known names, such as"
            " model.layers.0.self_attn.q_proj.weight"
        )
    hidden = _embedded(outside, folder)
    for part in (outside, *layers):
        part.widths |= {"h": hidden, "1": 1}
        part.read()
    heads = _heads(model, outside, layers[-1], folder)
    stored, sparse24 = _stored_format(outside, layers)
    biases = _biases(layers)
    real = replace(
        model,
        hidden=hidden,
        vocab=outside.widths["V"],
        norm=_norm(model, layers),
        learned_positions=outside.widths.get("P", 0),
        layers=tuple(_layer(part, model, biases, sparse24) for part in layers),
        numbers=tuple(part.number for part in layers),
        declared="" if sparse24 else model.declared,
        tied=model.tied and outside.widths.get("H", hidden) == hidden,
        weight_dtype=stored,
        dtype=model.dtype if stored == model.weight_dtype else "",
        unread_format="",
    )
    _check(real, layers)
    stored_twice = real.tied * heads * real.vocab * hidden
    parameters = outside.parameters + sum(part.parameters for part in layers) - stored_twice
    if parameters != real.parameters:
        expected = f"expected {real.parameters:,} parameters for its shapes"
        raise InputError(f"{folder}: {expected}, got {parameters:,}: the final norm is unusual")
    notes = _notes(model, real, ignored)
    own = f"{real.name} by its tensors: {'; '.join(notes)}" if notes else ""
    found = "; ".join(filter(None, (model.found, own)))
    return replace(real, found=found, mismatch=_mismatch(model, real))


def _embedded(outside: _Part, folder: str | Path) -> int:
    """Return the hidden size, from the embedding."""
    tables = (outside.modules.get(name, {}).get("weight") for name in ("embed_tokens", "embed_in"))
    table = next(filter(None, tables), None)
    if table is None or len(table.shape) != 2:
        raise InputError(
            f"{folder}: expected a whole model, found no embed_tokens.weight of two dimensions"
        )
    return table.shape[1]


def _heads(model: Model, outside: _Part, last: _Part, folder: str | Path) -> int:
    """Return the number of stored heads, none if the embedding is the head; InputError if its
    inputs are not the outputs of the last layer."""
    hidden = outside.widths["h"]
    inputs, wide = outside.widths.get("H", hidden), last.widths.get("out", hidden)
    if inputs != wide:
        where = outside.names.get("H", str(folder))
        raise InputError(
            f"{where}: expected a head of {wide:,} inputs, the outputs of the last layer, got"
            f" {inputs:,}"
        )
    heads = sum(name in outside.modules for name in ("lm_head", "embed_out"))
    if not heads and not model.tied:
        raise InputError(
            f"{folder}: expected lm_head.weight, or a config.json that ties it to the embedding"
        )
    return heads


def _stored_format(outside: _Part, layers: Sequence[_Part]) -> tuple[str, bool]:
    """Return the one format of the weights in layers, and whether they are 2:4."""
    formats = {key: name for part in reversed(layers) for key, name in part.formats.items()}
    if len(formats) > 1 and formats.keys() != {_MXFP4, ("", False)}:
        (one, first), (two, second) = sorted(formats.items())[:2]
        second = second.rsplit("tensor ")[-1]
        raise InputError(
            f"{first} is in {_format(*one)}, {second} is in {_format(*two)}; expected one format"
        )
    if outside.formats.keys() - {("", False)}:
        raise InputError(f"{next(iter(outside.formats.values()))}: expected a head of 16 bits")
    return _MXFP4 if _MXFP4 in formats else next(iter(formats), ("", False))


def _notes(model: Model, real: Model, ignored: int) -> tuple[str, ...]:
    """Return how the model in the tensors differs from that of its configuration."""
    notes = difference(model, real)
    stored = real.weight_dtype
    if real.parameters != model.parameters:
        notes += (f"{real.parameters:,} parameters, {model.parameters:,} in the config.json",)
    if stored != model.weight_dtype and stored in ("fp8", "fp8_block", "nvfp4", "int8"):
        notes += (f"--dtype {stored if stored == 'int8' else 'fp8'} computes in it",)
    if ignored:
        notes += (f"{ignored:,} parameters outside the decoder are ignored",)
    return notes


def _mismatch(model: Model, real: Model) -> str:
    """Return the differences that are not the formats of the weights."""
    alike = replace(
        real,
        layers=tuple(map(_dense, real.layers)) if real.sparse24 else real.layers,
        declared=model.declared,
        **{name: getattr(model, name) for name in FORMATS},
    )
    return "; ".join(difference(model, alike))


_NUMBERED = re.compile(rf"(?:.*\.)?(?:layers|h|blocks?)\.(\d{{1,5}})\.(.+?)(?:\.({_PARTS}))?")


def _counted(model: Model, tensors: Mapping[str, Tensor], folder: str) -> Model:
    """Return the model of a configuration whose layers have as many parameters as the tensors."""
    modules: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _NUMBERED.fullmatch(name)) and not BUFFER.fullmatch(name):
            number, module, leaf = match.groups()
            modules.setdefault((int(number), module), {})[leaf or ""] = tensor
    stored = [0] * len(model.layers)
    for (number, module), parts in modules.items():
        if number >= len(stored) or _is_unused(model.layers[number], module):
            continue  # a tensor of a layer that predicts further tokens, or of no use
        try:
            stored[number] += _elements(parts)
        except ValueError as error:
            name = one_line(f"layers.{number}.{module}", 80)
            raise InputError(f"{folder}: tensor {name}: {error}") from None
    stated = [
        model.parameters_of(layer) - sum(s.stored_outside(model.hidden) for s in layer.sublayers)
        for layer in model.layers
    ]
    different = [i for i, pair in enumerate(zip(stored, stated)) if pair[0] != pair[1]]
    if different and sum(stored) != sum(stated):  # layers that share weights store them once
        first = different[0]
        raise InputError(
            f"{folder}: layer {first}: expected {stated[first]:,} parameters, as its config.json"
            f" states, got {stored[first]:,}"
        )
    return model


_KEYS_AND_VALUES = re.compile(r"self_attn\.[kv]_(proj|norm)")


def _is_unused(layer: Layer, module: str) -> bool:
    """Return whether files of Gemma 3n and 4 hold a module that the model does not have: keys and
    values of a layer that reads the cache of another."""
    attention = layer.of("attention")
    shares = isinstance(attention, SharedCacheAttention) and attention.reads_cache
    return shares and _KEYS_AND_VALUES.fullmatch(module) is not None


def _elements(parts: Mapping[str, Tensor]) -> int:
    """Return the parameters of a module in any format, biases included."""
    packed = any(name in parts and parts[name].dtype not in FLOATS for name in WEIGHTS)
    if not packed:
        return sum(tensor.elements for tensor in parts.values() if tensor.dtype in FLOATS)
    bias = parts["bias"].elements if "bias" in parts else 0
    return math.prod(logical(parts).shape) + bias


def _sorted(
    model: Model, tensors: Mapping[str, Tensor], where: str
) -> tuple[_Part, list[_Part], int]:
    """Return tensors outside the layers, tensors per layer, and the number of parameters outside
    the decoder."""
    outside = _Part(where, -1)
    layers = dict[int, _Part]()
    ignored = 0
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        number, module, leaf, other = match.groups() if match else (None, name, None, None)
        leaf = leaf or other or "weight"
        if number is None and not axes_of(module, OUTSIDE):
            ignored += (
                tensor.elements if tensor.dtype in FLOATS and not BUFFER.fullmatch(name) else 0
            )
            continue
        if BUFFER.fullmatch(module) or (module in ("attention", "attn") and leaf == "bias"):
            continue
        part = (
            outside if number is None else layers.setdefault(int(number), _Part(where, int(number)))
        )
        stored = part.modules.setdefault(module, {})
        if leaf in stored:
            raise InputError(f"{part.name(module)}: appears twice, under two names")
        stored[leaf] = tensor
    for number in [n for n, part in layers.items() if n >= len(model.layers)]:
        part = layers.pop(number)
        if "eh_proj" not in part.modules:  # a layer with it predicts a further token
            raise InputError(
                f"{where}: expected layers below {len(model.layers)}, by its config.json, got"
                f" {number}"
            )
        ignored += sum(t.elements for parts in part.modules.values() for t in parts.values())
    return outside, [layers[number] for number in sorted(layers)], ignored


def _biases(layers: Iterable[_Part]) -> Mapping[str, bool]:
    """Return which projections have biases, which pruning can add (FLAP, arXiv 2312.11983)."""
    found = {factor_of(module)[0] for part in layers for module in part.biases}
    shown = {
        name: any(map(re.compile(_PREFIXES[prefix] + pattern).fullmatch, found))
        for name, (prefix, pattern) in _NAMES["biases"].items()
    }
    return shown | {"down_bias": shown["down_bias"] and not shown["mlp_bias"]}


def _norm(model: Model, layers: Iterable[_Part]) -> str:
    """Return the kind of the norms between sublayers; those of SliceGPT have no weights."""
    modules = {module for part in layers for module in part.modules}
    normed = any(re.fullmatch(".*layer_?norm", module) for module in modules)
    return "none" if modules & {*SHORTCUTS.values()} and not normed else model.norm


def _layer(part: _Part, model: Model, biases: Mapping[str, bool], sparse24: bool) -> Layer:
    """Return the layer in the tensors of a part; other fields are those of the configuration."""
    old = model.layers[part.number]
    sublayers = (_attention(part, model, old, biases), _mlp(part, old, biases))
    forms = {
        name[5:]: Form(rank=rank)
        for name, rank in sorted(part.widths.items())
        if name.startswith("rank ")
    }
    layer = replace(old, sublayers=tuple(s for s in sublayers if s is not None))
    return layer.each(lambda sublayer: _formed(sublayer, forms, sparse24))


def _formed(sublayer: Sublayer, forms: Mapping[str, Form], sparse24: bool) -> Sublayer:
    """Return a sublayer with the forms of its weights."""
    fused = {"attention": "qkv", "mlp": "gate_up"}[PART_NAMES[sublayer.part]]
    roles = [*sublayer.weights(1), fused]
    stored = {role: forms[role] for role in roles if role in forms}
    if sparse24:
        compressed = [role for role in sublayer.weights(1) if role in COMPRESSED]
        stored |= {
            role: replace(stored.get(role, PLAIN), zeros="2:4", density=0.5) for role in compressed
        }
    return sublayer.with_forms(stored) if stored else sublayer


def _dense(layer: Layer) -> Layer:
    """Return a layer without zeros in its weights."""
    return layer.each(
        lambda s: s.with_forms({role: replace(f, zeros="", density=1.0) for role, f in s.forms})
    )


def _attention(
    part: _Part, model: Model, old: Layer, biases: Mapping[str, bool]
) -> Sublayer | None:
    width = part.widths
    if part.has(ATTENTION + "linear_attn"):
        return Linear(replaces=Part.ATTENTION)
    rotates = SHORTCUTS["attention"] in part.modules
    dense = old.of("attention")
    if "delta" in width:
        return _delta_net(part, dense, rotates)
    if "rank" in width:
        return _latent(part, dense, rotates)
    if "q" not in width and "qkv" not in width:
        return None
    usual = dense if isinstance(dense, Attention) else model.attention
    if not isinstance(usual, Attention):
        raise part.unstated("attention")
    heads, kv_heads = _grouped_heads(part, usual)
    return replace(
        usual,
        heads=heads,
        kv_heads=kv_heads,
        qkv_bias=biases["qkv_bias"],
        o_bias=biases["o_bias"],
        rotates=rotates,
    )


def _grouped_heads(part: _Part, usual: Attention) -> tuple[int, int]:
    """Return query heads and key/value heads of grouped-query attention."""
    width = part.widths
    features = usual.head_dim
    if "qkv" in width and "o" in width:
        part.put("q", width["o"], part.names["o"])
        part.put("2kv", width["qkv"] - width["q"], part.names["qkv"])
    if usual.gate and "q" in width:  # one product makes queries and gates
        width["q"] = part.divided("q", 2, "two halves,")
    heads, kv_heads, _ = (part.divided(name, features, "head_dim") for name in ("q", "kv", "o"))
    part.put("q", width["o"], part.names["o"])
    if heads and (not kv_heads or heads % kv_heads):
        raise InputError(
            f"{part.names['q']}: expected a multiple of {kv_heads} key/value heads, got"
            f" {heads} heads"
        )
    return heads, kv_heads


def _latent(part: _Part, dense: Sublayer | None, rotates: bool) -> LatentAttention:
    if not isinstance(dense, LatentAttention):
        raise part.unstated("latent attention")
    heads = part.divided("o", dense.value, "features of a value head,")
    rank, query_rank = (part.widths.get(name, 0) for name in ("rank", "q_rank"))
    return replace(dense, heads=heads, query_rank=query_rank, rank=rank, rotates=rotates)


def _delta_net(part: _Part, dense: Sublayer | None, rotates: bool) -> DeltaNet:
    if not isinstance(dense, DeltaNet):
        raise part.unstated("a gated delta net")
    heads = part.divided("values", dense.value, "features of a value head,")
    # features of queries and keys together
    keys = part.widths.get("channels", 0) - part.widths["values"]
    groups = part.divided("channels", 2 * dense.key, "features of two key heads,", keys)
    return replace(dense, heads=heads, kv_heads=groups, rotates=rotates)


def _mlp(part: _Part, old: Layer, biases: Mapping[str, bool]) -> Sublayer | None:
    width = part.widths
    dense = old.of("mlp")
    if part.has("mlp.linear_mlp"):
        return Linear(replaces=Part.MLP)
    rotates = SHORTCUTS["mlp"] in part.modules
    out = width.get("out", width["h"])
    if out != width["h"] and not rotates:
        raise InputError(
            f"{part.names['out']}: expected a width of {width['h']:,}, as in the embedding, got"
            f" {out:,}"
        )
    if experts := width.get("E", 0):
        if not isinstance(dense, Experts):
            raise part.unstated(f"{experts} experts")
        if "e" not in width:
            raise InputError(f"{part.where}: layer {part.number} has experts without weights")
        return replace(
            dense,
            experts=experts,
            active=min(dense.active, experts),
            inner=width["e"],
            shared_inner=width.get("i", 0),
            shared_bias=biases["mlp_bias"],
            shared_gate=dense.shared_gate and width.get("i", 0) > 0,
            rotates=rotates,
        )
    if not width.get("i", 0):
        return None
    return replace(
        dense if isinstance(dense, Mlp) else Mlp(inner=0),
        inner=width["i"],
        bias=biases["mlp_bias"],
        down_bias=biases["down_bias"],
        out=out if out != width["h"] else 0,
        rotates=rotates,
    )


def _check(model: Model, layers: Sequence[_Part]) -> None:
    """Raise InputError if layers have other parameters than their shapes require."""
    made = [model.parameters_of(layer) for layer in model.layers]
    if wrong := [i for i, part in enumerate(layers) if part.parameters != made[i]]:
        one = layers[wrong[0]]
        which = f"{one.where}: layers {runs(layers[i].number for i in wrong)}"
        expected = f"expected {made[wrong[0]]:,} parameters, got {one.parameters:,}"
        raise InputError(f"{which}: {expected}: check the biases and norms of its architecture")


def _format(dtype: str, sparse24: bool) -> str:
    return (dtype or "16 bits or more") + " as 2:4" * sparse24
