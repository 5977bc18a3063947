"""Read the number formats that a configuration states, in its ``quantization_config`` or in
ModelOpt's ``hf_quant_config.json``: :func:`with_formats`.

If engines convert the activations too (fp8, int8 and nvfp4 checkpoints), they compute in the stated
format; weights alone (AWQ, GPTQ) are computed in 16 bits. Keys are those of Transformers
(src/transformers/utils/quantization_config.py), compressed-tensors
(src/compressed_tensors/quantization/quant_args.py), NVIDIA ModelOpt
(modelopt/torch/export/convert_hf_config.py) and vLLM (vllm/model_executor/layers/quantization).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simulator.arguments import shown
from simulator.display import few, with_and
from simulator.errors import one_line
from simulator.models.architectures.reader import Reader
from simulator.models.model import Model
from simulator.models.tables import read_names

FORMATS: Mapping[str, str] = {
    "weight_dtype": "weights",
    "dtype": "arithmetic",
    "kv_dtype": "K/V cache",
}
"""Fields of a model and of a request that are number formats, in words."""

QUANT_ALGOS: Mapping[str, tuple[str, str]] = {
    algorithm: tuple(formats) for algorithm, formats in read_names("quant_algos").items()
}
"""Formats of weights and arithmetic ("": 16 bits) by ``quant_algo`` of ModelOpt and TensorRT-LLM
(tensorrt_llm/quantization/mode.py). vLLM converts the activations for FP8_PB_WO, although WO means
"weights only"."""

# weights and arithmetic that config_groups may state
_SCHEMES = {*QUANT_ALGOS.values(), ("int4", "int8"), ("fp8", ""), ("fp8_block", "")}

_NUMBERS = {"int4": (4, "int"), "int8": (8, "int"), "fp8": (8, "float"), "nvfp4": (4, "float")}
"""Bits and type of a number in ``config_groups``."""

_BLOCK = [128, 128]  # weights per scale of fp8_block
_NVFP4_GROUP = 16  # weights per scale of nvfp4; MXFP4 has 32

_EXCLUDED = (
    "ignore",
    "exclude_modules",
    "modules_to_not_convert",
    "ignored_layers",
    "llm_int8_skip_modules",
)
"""Keys with the modules that are not quantised."""

_WIDE = re.compile(
    r".*norm.*|embed.*|vis.*|audio.*|.*projector|lm_head|router|gate|shared_expert_gate|conv1d"
    r"|in_proj_ba|mtp"
)
"""Parts of the names of modules that count as 16 bits in any checkpoint, or are not timed."""


@dataclass(frozen=True)
class StatedFormats:
    """Number formats that a configuration states, in the fields of :class:`simulator.Model`."""

    weight_dtype: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    unread_format: str = ""


NOTHING = StatedFormats()


def with_formats(model: Model, read: Reader) -> Model:
    """Return a model with the number formats in an object of its configuration, and notes on what
    is counted otherwise."""
    method = _method(read)
    stated = _METHODS.get(method, _unknown)(read)
    cache, *notes = _cache(read)
    if stated == NOTHING and not cache and read.raw("sparsity_config") is None:
        stated = StatedFormats(unread_format=f"{method} without a number format")
    # mxfp4 is a format of routed experts only
    if stated.weight_dtype not in ("", "mxfp4"):
        notes += _partial(read)
    if method == "bitsandbytes" and stated.dtype:
        # T. Dettmers et al., "LLM.int8()", arXiv 2208.07339
        notes.append("LLM.int8() computes outlier features in 16 bits, which is not timed")
    found = (model.found, *(f"{model.name}: {note}" for note in notes))
    return replace(
        model, **vars(replace(stated, kv_dtype=cache)), found="; ".join(filter(None, found))
    )


def without_formats(model: Model) -> Model:
    """Return a model that states no number format."""
    return replace(model, **vars(NOTHING))


def formats_text(formats: Mapping[str, str]) -> str:
    """Return formats by names of :data:`FORMATS` as text.

    >>> formats_text({"weight_dtype": "fp8", "dtype": "fp8", "kv_dtype": "int8"})
    'weights and arithmetic in fp8, K/V cache in int8'
    """
    words: dict[str, list[str]] = {}
    for name, dtype in formats.items():
        words.setdefault(dtype, []).append(FORMATS[name])
    return ", ".join(f"{with_and(some)} in {dtype}" for dtype, some in words.items())


def stated_text(model: Model) -> str:
    """Return the formats that the configuration of a model states as text, "" for none."""
    return formats_text({name: own for name in FORMATS if (own := getattr(model, name))})


def _method(read: Reader) -> str:
    """Return the method; ModelOpt and compressed-tensors do not always name it."""
    method = read.raw("quant_method")
    if method is None and read.data.keys() & {"quantization", "quant_algo"}:
        return "modelopt"
    if method is None and read.data.keys() & {"config_groups", "sparsity_config"}:
        return "compressed-tensors"
    return method.lower().replace("_", "-") if isinstance(method, str) else ""


def _unknown(read: Reader) -> StatedFormats:
    return StatedFormats(unread_format=f"quant_method {shown(read.raw('quant_method'))}")


def _integers(read: Reader) -> StatedFormats:
    """Return the format of AWQ, GPTQ and AutoRound: weights of 4 or 8 bits alone."""
    right = {"bits": (4, 8), "data_type": (None, "int"), "act_bits": (None, 16)}
    if odd := [key for key, values in right.items() if read.raw(key) not in values]:
        return StatedFormats(
            unread_format=f"{_method(read)} with {odd[0]} {shown(read.raw(odd[0]))}"
        )
    return StatedFormats(f"int{int(read.raw('bits'))}")


def _bitsandbytes(read: Reader) -> StatedFormats:
    if read.flag("load_in_4bit"):
        return StatedFormats("int4")
    return StatedFormats("int8", "int8") if read.flag("load_in_8bit") else NOTHING


def _fp8(read: Reader) -> StatedFormats:
    block = read.raw("weight_block_size")
    experts = read.raw("expert_dtype")
    if experts not in (None, "fp8"):
        return StatedFormats(unread_format=f"expert_dtype {shown(experts)}")
    if block not in (None, _BLOCK):
        return StatedFormats(unread_format=f"weight_block_size {shown(block)}")
    return StatedFormats("fp8_block" if block else "fp8", "fp8")


def _modelopt(read: Reader) -> StatedFormats:
    algorithm = _inside(read).raw("quant_algo")
    if algorithm is None:
        return _compressed_tensors(read)
    known = QUANT_ALGOS.get(algorithm.upper()) if isinstance(algorithm, str) else None
    if known is None:
        return StatedFormats(unread_format=f"quant_algo {shown(algorithm)}")
    return StatedFormats(*known)


def _inside(read: Reader) -> Reader:
    """Return the object with the keys of ModelOpt; in ``hf_quant_config.json`` it is a part."""
    return read.part("quantization") if read.raw("quantization") is not None else read


def _compressed_tensors(read: Reader) -> StatedFormats:
    """Return the format of ``config_groups``; several formats are not understood."""
    schemes = dict.fromkeys(map(_scheme, _groups(read)))
    stated = [scheme for scheme in schemes if scheme != NOTHING]
    unread = [scheme for scheme in stated if scheme.unread_format]
    if len(stated) > 1 and not unread:
        names = few(scheme.weight_dtype for scheme in stated)
        return StatedFormats(unread_format=f"config_groups in several formats ({names})")
    return (*unread, *stated, NOTHING)[0]


def _groups(read: Reader) -> list[Reader]:
    groups = read.part("config_groups").data if read.raw("config_groups") else {}
    if odd := [group for group in groups.values() if not isinstance(group, Mapping)]:
        raise read.fail("config_groups", f"expected objects, got {shown(odd[0])}")
    return [Reader(one, read.source, f"{read.place}config_groups.") for one in groups.values()]


def _scheme(group: Reader) -> StatedFormats:
    """Return the format of a group: of its weights, and of activations that engines convert."""
    if group.raw("weights") is None:
        return NOTHING
    weights = group.part("weights")
    arithmetic = ""
    stored = _number(weights)
    if group.raw("input_activations") is not None:
        arithmetic = _number(group.part("input_activations"))
    strategy = weights.raw("strategy")
    block = weights.raw("block_structure")
    if stored == "fp8" and strategy == "block" and block == _BLOCK:
        stored = "fp8_block"
    elif stored == "fp8" and strategy not in (None, "tensor", "channel"):
        stored = f"fp8 ({shown(strategy)} of {shown(block or weights.raw('group_size'))})"
    elif stored == "nvfp4" and weights.raw("group_size") != _NVFP4_GROUP:
        stored = f"4-bit float (groups of {shown(weights.raw('group_size'))})"
    if (stored, arithmetic) in _SCHEMES:
        return StatedFormats(stored, arithmetic)
    also = f" with {arithmetic} activations" if arithmetic else ""
    return StatedFormats(unread_format=f"config_groups of {stored} weights{also}")


def _number(read: Reader) -> str:
    """Return the format of a number, or a text for one that is not understood."""
    bits = read.raw("num_bits")
    kind = read.raw("type") or "int"
    named = (name for name, known in _NUMBERS.items() if known == (bits, kind))
    return next(named, f"{shown(bits)}-bit {shown(kind)}")


_METHODS: Mapping[str, Callable[[Reader], StatedFormats]] = {
    **dict.fromkeys(("awq", "gptq", "auto-round"), _integers),
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm-fp8": lambda read: StatedFormats("fp8", "fp8"),
    **dict.fromkeys(("modelopt", "modelopt-fp4"), _modelopt),
    "mxfp4": lambda read: StatedFormats("mxfp4"),
    "nvfp4": lambda read: StatedFormats("nvfp4", "nvfp4"),
}
"""Rule of each ``quant_method``, in which "-" and "_" are equal."""


def _cache(read: Reader) -> list[str]:
    """Return the format of the K/V cache, and a note on one that is not understood."""
    scheme = read.raw("kv_cache_scheme")
    scheme = _inside(read).raw("kv_cache_quant_algo") if scheme is None else scheme
    if scheme is None:
        return [""]
    stated = _number(read.part("kv_cache_scheme")) if isinstance(scheme, Mapping) else scheme
    if isinstance(stated, str) and stated.lower() in ("fp8", "int8", "nvfp4"):
        return [stated.lower()]
    return ["", f"a K/V cache in {shown(stated)} is not understood; state it with --kv-dtype"]


def _partial(read: Reader) -> Iterator[str]:
    """Yield notes on modules that count as quantised although they are not."""
    excluded = [
        name for one in (read, _inside(read)) for key in _EXCLUDED for name in _texts(one.raw(key))
    ]
    only = _texts(read.raw("modules_in_block_to_quantize"))
    only += [name for group in _groups(read) for name in _texts(group.raw("targets"))]
    if modules := _modules(excluded):
        yield f"modules that stay in 16 bits count as quantised ({modules})"
    if "Linear" not in only and (modules := _modules(only)):
        yield f"only some modules are quantised ({modules}), but all projections count as quantised"


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, and of lists in it."""
    parts = [*value] if isinstance(value, list) else []
    inner = [text for part in parts if isinstance(part, list) for text in part]
    return [text for text in (*parts, *inner) if isinstance(text, str)]


def _modules(names: Iterable[str]) -> str:
    """Return the names of modules other than :data:`_WIDE`, equal ones of all layers once."""
    plain = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removeprefix("re:")) for name in names)
    narrow = [name for name in plain if not any(map(_WIDE.fullmatch, re.findall(r"\w+", name)))]
    return one_line(few(narrow, 3), 160)
