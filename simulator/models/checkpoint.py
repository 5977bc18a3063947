"""Read a model from the tensors of its checkpoint: :func:`from_tensors`.

The axes of each named tensor are widths of its layer (:mod:`simulator.models.tensors`). Tensors must agree on each
width, and the resulting model must have exactly the number of parameters in the headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from simulator.errors import InputError, one_line
from simulator.models.config import Block, Latent, ModelConfig, layer_fields
from simulator.models.difference import difference, runs
from simulator.models.tensors import (
    ATTENTION,
    BUFFER,
    EXPERT,
    EXPERTS,
    FLOATS,
    LAYER,
    MLP,
    NAME,
    OUTSIDE,
    ROUTED,
    WEIGHTS,
    WIDE,
    Tensor,
    Weight,
    axes_of,
    factor_of,
    logical,
)

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
    formats: dict[tuple[str, bool], str] = field(default_factory=dict)  # format -> a tensor stored in it
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
            width, size = width[1:], size // 2
        if size > MAX_WIDTH:
            raise InputError(f"{name}: expected widths up to {MAX_WIDTH:,}, got {size:,}")
        if (known := self.widths.setdefault(width, size)) != size:
            other = self.names.get(width, "the embedding or the number of experts").rsplit("tensor ")[-1]
            raise InputError(f"{name}: expected a width of {known:,}, as in {other}, got {size:,}")
        self.names.setdefault(width, name)

    def read(self, bits: int) -> None:
        """Read widths, formats and parameters of all modules."""
        table = LAYER if self.number >= 0 else OUTSIDE
        found = {module: axes_of(module, table) for module in self.modules}
        fused = any(axes[0] == "E" for axes in found.values() if len(axes) == 3)
        count = len({m.split(".experts.")[1].split(".")[0] for m in found if re.match(EXPERT, m)})
        if count and not fused:
            self.put("E", count, f"{self.where}: layer {self.number}")
        # weights whose inputs are the hidden size come first: some packed layouts need the widths of these weights
        for module, axes in sorted(found.items(), key=lambda item: len(item[1]) == 2 and item[1][1] != "h"):
            parts, name = self.modules[module], self.name(module)
            if not axes:
                if not (parts.keys() & {*WEIGHTS, "bias"}):
                    continue  # scales of a cache
                raise InputError(f"{name}: belongs to no known layer; expected a merged model without further weights")
            try:
                weight = logical(parts, self.widths.get(axes[-1], 0), self.widths.get(axes[0], 0), bits)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            if len(weight.shape) != len(axes):
                raise InputError(f"{name}: expected {len(axes)} dimensions, got {len(weight.shape)}")
            self.take(module, axes, weight, parts.get("bias"))

    def take(self, module: str, axes: tuple[str, ...], weight: Weight, bias: Tensor | None) -> None:
        name, size = self.name(module), 1
        for width, length in zip(axes, weight.shape):
            self.put(width, length, name)
            size *= length
        self.parameters += size
        if not WIDE.fullmatch(module) and module not in ("embed_tokens", "embed_in"):
            self.formats.setdefault((weight.dtype, weight.sparse24), name)
        if bias is not None:
            if bias.shape != weight.shape[:1] or bias.dtype not in FLOATS:
                raise InputError(f"{name}.bias: expected {weight.shape[0]:,} floats, one per output")
            self.biases.add(module)
            self.parameters += bias.elements

    def divided(self, width: str, by: int, what: str, size: int | None = None) -> int:
        size = self.widths[width] if size is None else size
        if by <= 0 or size < 0 or size % by:
            raise InputError(f"{self.names[width]}: expected a multiple of {what} {by:,}, got {size:,}")
        return size // by

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, module) for module in self.modules)


def from_tensors(model: ModelConfig, tensors: Mapping[str, Tensor], folder: str | Path) -> ModelConfig:
    """Return the model in a checkpoint: widths, layers and formats of its tensors replace those of its configuration.

    :attr:`ModelConfig.found` reports the differences. Raises InputError, one line, if the tensors and their number of
    parameters cannot be explained exactly."""
    outside, layers, ignored = _sorted(model, tensors, str(folder))
    tables = (outside.modules.get(name, {}).get("weight") for name in ("embed_tokens", "embed_in"))
    table = next(filter(None, tables), None)
    if table is None or len(table.shape) != 2:
        raise InputError(f"{folder}: expected a whole model, found no embed_tokens.weight of two dimensions")
    if not layers:
        raise InputError(f"{folder}: expected layers with known names, such as model.layers.0.self_attn.q_proj.weight")
    hidden = table.shape[1]
    for part in (outside, *layers):
        part.widths |= {"h": hidden, "1": 1}
        part.read(_bits(part, hidden))
    last = outside.widths.get("H", hidden)
    if last != (wide := layers[-1].widths.get("out", hidden)):
        where = outside.names.get("H", str(folder))
        raise InputError(f"{where}: expected a head of {wide:,} inputs, the outputs of the last layer, got {last:,}")
    heads = [name for name in ("lm_head", "embed_out") if name in outside.modules]
    if not heads and not model.tied:
        raise InputError(f"{folder}: expected lm_head.weight, or a config.json that ties it to the embedding")
    formats = {key: name for part in reversed(layers) for key, name in part.formats.items()}
    if len(formats) > 1 and formats.keys() != {_MXFP4, ("", False)}:
        (one, first), (two, second) = sorted(formats.items())[:2]
        second = second.rsplit("tensor ")[-1]
        raise InputError(f"{first} is in {_format(*one)}, {second} is in {_format(*two)}; expected one format")
    if outside.formats.keys() - {("", False)}:
        raise InputError(f"{next(iter(outside.formats.values()))}: expected a head of 16 bits")
    stored, sparse24 = _MXFP4 if _MXFP4 in formats else next(iter(formats), ("", False))
    latents = {_latent(part) for part in layers if "rank" in part.widths}
    if len(latents) > 1:
        raise InputError(f"{folder}: expected the same ranks of latent attention in all layers")
    latent = next(iter(latents), None)
    real = replace(
        _with_flags(model, layers),
        hidden=hidden,
        vocab=outside.widths["V"],
        learned_positions=outside.widths.get("P", 0),
        layers=len(layers),
        numbers=tuple(part.number for part in layers),
        windows=tuple(model.windows[part.number] for part in layers),
        latent=latent,
        head_dim=latent.plain + latent.rotary if latent is not None else model.head_dim,
        sparse24=sparse24,
        declared="" if sparse24 else model.declared,
        tied=model.tied and last == hidden,
        weight_dtype=stored,
    )
    blocks = tuple(_block(part, real, model.layout[part.number]) for part in layers)
    real = replace(real, **layer_fields(blocks))
    _check(real, layers)
    stored_twice = real.tied * len(heads) * real.vocab * hidden
    parameters = outside.parameters + sum(part.parameters for part in layers) - stored_twice
    if parameters != real.parameters:
        expected = f"expected {real.parameters:,} parameters for its shapes"
        raise InputError(f"{folder}: {expected}, got {parameters:,}: the final norm is unusual")
    notes = difference(model, real)
    mismatch = "; ".join(difference(model, replace(real, sparse24=model.sparse24, weight_dtype=model.weight_dtype)))
    if real.parameters != model.parameters:
        notes += (f"{real.parameters:,} parameters, {model.parameters:,} in the config.json",)
    if stored in ("fp8", "fp8_block", "nvfp4", "int8"):
        notes += (f"dtype {stored if stored == 'int8' else 'fp8'} computes in it",)
    if ignored:
        notes += (f"{ignored:,} parameters outside the decoder are ignored",)
    own = f"{real.name} by its tensors: {'; '.join(notes)}" if notes else ""
    return replace(real, found="; ".join(filter(None, (model.found, own))), mismatch=mismatch)


def _sorted(model: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> tuple[_Part, list[_Part], int]:
    """Return tensors outside the layers, tensors per layer, and the number of parameters outside the decoder."""
    outside, layers, ignored = _Part(where, -1), dict[int, _Part](), 0
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        number, module, leaf, other = match.groups() if match else (None, name, None, None)
        leaf = leaf or other or "weight"
        if number is None and not axes_of(module, OUTSIDE):
            ignored += tensor.elements if tensor.dtype in FLOATS and not BUFFER.fullmatch(name) else 0
            continue
        if BUFFER.fullmatch(module) or (module in ("attention", "attn") and leaf == "bias"):
            continue
        part = outside if number is None else layers.setdefault(int(number), _Part(where, int(number)))
        stored = part.modules.setdefault(module, {})
        if leaf in stored:
            raise InputError(f"{part.name(module)}: appears twice, under two names")
        stored[leaf] = tensor
    for number in [n for n, part in layers.items() if n >= model.layers]:
        part = layers.pop(number)
        if "eh_proj" not in part.modules:  # a layer with it predicts a further token
            raise InputError(f"{where}: expected layers below {model.layers}, by its config.json, got {number}")
        ignored += sum(t.elements for parts in part.modules.values() for t in parts.values())
    return outside, [layers[number] for number in sorted(layers)], ignored


def _bits(part: _Part, hidden: int) -> int:
    """Return the bits of packed integers in compressed-tensors, from a weight whose inputs are the hidden size; 0 if
    there is none."""
    for module, parts in part.modules.items():
        packed = parts.get("weight_packed")
        if packed is not None and packed.dtype == "I32" and len(packed.shape) == 2 and packed.shape[1]:
            axes = axes_of(module, LAYER)
            fits = [bits for bits in (4, 8) if -(-hidden * bits // 32) == packed.shape[1]]
            if len(axes) == 2 and axes[1] == "h" and fits:
                return fits[0]
    return 0


def _latent(part: _Part) -> Latent | None:
    """Return latent attention from its widths: q, kv_b and o are multiples of the heads; q + o - kv_b is rotated."""
    width = part.widths
    if missing := [name for name in ("q", "kv_a", "kv_b", "o") if name not in width]:
        raise InputError(f"{part.where}: layer {part.number} has latent attention without {missing[0]}")
    rotary = width["kv_a"] - width["rank"]
    heads = part.divided("kv_a", rotary, "rotated features", width["q"] + width["o"] - width["kv_b"])
    query, both, value = (part.divided(name, heads, "heads") for name in ("q", "kv_b", "o"))
    return Latent(width.get("q_rank", 0), width["rank"], rotary, query - rotary, value) if both else None


def _block(part: _Part, model: ModelConfig, old: Block) -> Block:
    """Return the shapes of one layer."""
    width, d, heads, kv_heads = part.widths, model.head_dim, 0, 0
    if delta := "delta" in width:
        heads, kv_heads = _delta_heads(part, model)
    elif "rank" in width:
        heads = kv_heads = part.divided("q", d, "the features of a head,")
    elif "q" in width or "qkv" in width:
        if "qkv" in width and "o" in width:
            part.put("q", width["o"], part.names["o"])
            part.put("2kv", width["qkv"] - width["q"], part.names["qkv"])
        if model.output_gate and "q" in width:  # one product makes queries and gates
            width["q"] = part.divided("q", 2, "two halves,")
        for name in ("q", "kv", "o"):
            if name not in width:
                raise InputError(f"{part.where}: layer {part.number} has attention without its {name} projection")
            part.divided(name, d, "head_dim")
        part.put("q", width["o"], part.names["o"])
        heads, kv_heads = width["q"] // d, width["kv"] // d
        if heads and (not kv_heads or heads % kv_heads):
            raise InputError(f"{part.names['q']}: expected a multiple of {kv_heads} key/value heads, got {heads} heads")
    own = {"heads": heads, "q_norm": d if model.qk_norm == "head" else heads * d}
    own["k_norm"] = d if model.qk_norm == "head" else kv_heads * d
    for name, size in own.items():
        if width.get(name, size) != size:
            raise InputError(f"{part.names[name]}: expected {size:,}, got {width[name]:,}")
    experts = width.get("E", 0)
    if experts and ("e" not in width or not old.active):
        why = "without weights" if "e" not in width else "but its config.json has none"
        raise InputError(f"{part.where}: layer {part.number} has {experts} experts {why}")
    linear = ("attention",) * part.has(ATTENTION + "linear_attn") + ("mlp",) * part.has("mlp.linear_mlp")
    shortcuts = tuple(name for name, short in SHORTCUTS.items() if short in part.modules)
    out = width.get("out", width["h"])
    if out != width["h"] and "mlp" not in shortcuts:
        raise InputError(f"{part.names['out']}: expected a width of {width['h']:,}, as in the embedding, got {out:,}")
    return replace(
        old,
        heads=heads,
        kv_heads=kv_heads,
        inner=width.get("i", 0),
        experts=experts,
        active=min(old.active, experts) if experts else 0.0,
        expert_inner=width["e"] if experts else 0,
        linear=linear,
        delta=delta,
        ranks=tuple((name[5:], rank) for name, rank in sorted(width.items()) if name.startswith("rank ")),
        shortcuts=shortcuts,
        out=out if out != width["h"] else 0,
    )


def _delta_heads(part: _Part, model: ModelConfig) -> tuple[int, int]:
    """Return the value heads and key heads of a gated delta net."""
    width, own = part.widths, model.delta
    if own is None or (missing := [n for n in ("delta_in", "channels", "conv", "value", "values") if n not in width]):
        why = "its config.json has none" if own is None else f"without {missing[0]}"
        raise InputError(f"{part.where}: layer {part.number} has a gated delta net, but {why}")
    keys = part.divided("channels", 2, "two halves,", width["channels"] - width["values"])
    for name, size in (("delta_in", 2 * (keys + width["values"])), ("value", own.value), ("conv", own.conv)):
        if width[name] != size:
            raise InputError(f"{part.names[name]}: expected {size:,}, got {width[name]:,}")
    if width["values"] != width["delta"] * own.value:
        expected = f"expected {width['delta']} heads of {own.value} features"
        raise InputError(f"{part.names['values']}: {expected}, got {width['values']:,}")
    return width["delta"], part.divided("channels", own.key, "the features of a head,", keys)


def _with_flags(model: ModelConfig, layers: Iterable[_Part]) -> ModelConfig:
    """Return the model with the biases and norms that its layers have."""
    biases, modules = (
        {factor_of(module)[0] for part in layers for module in getattr(part, name)} for name in ("biases", "modules")
    )

    def some(pattern: str, among: Iterable[str] = biases) -> bool:
        return any(re.fullmatch(pattern, module) for module in among)

    up = some(MLP + "(?:gate_proj|up_proj|gate_up_proj|fc1|dense_h_to_4h)")
    norms = {part.widths["q_norm"] for part in layers if "q_norm" in part.widths}
    unit = model.qk_norm if model.qk_norm == "unit" else ""  # a norm without weights
    return replace(
        model,
        qkv_bias=some(ATTENTION + "(?:[qkv]_proj|qkv_proj|query_key_value)"),
        o_bias=some(ATTENTION + "(?:o_proj|out_proj|dense)"),
        mlp_bias=up,
        down_bias=not up and some(MLP + "(?:down_proj|fc2|dense_4h_to_h)"),
        router_bias=some(ROUTED + "(?:gate|router)") or some(".*e_score_correction_bias", modules),
        expert_bias=some(EXPERTS + ".*_bias", modules),
        shared_gate=some("mlp.shared_expert_gate", modules),
        sinks=some(ATTENTION + "sinks", modules),
        qk_norm=("head" if norms == {model.head_dim} else "width") if norms else unit,
        norm="none" if modules & {*SHORTCUTS.values()} and not some(".*(?:layer|layer_)norm", modules) else model.norm,
        gated=model.gated and not some(MLP + "(?:fc1|dense_h_to_4h)", modules),
    )


def _check(model: ModelConfig, layers: list[_Part]) -> None:
    """Raise InputError if layers have other parameters than their shapes require.

    The error names a tensor that distinguishes the layer from the most similar correct layer."""
    made = [model.block_parameters(block) for block in model.layout]
    names = [{*part.modules, *(f"{module}.bias" for module in part.biases)} for part in layers]
    wrong = [i for i, part in enumerate(layers) if part.parameters != made[i]]
    if not wrong:
        return
    one, why = wrong[0], "check the biases and norms of its architecture"
    if right := [i for i in range(len(layers)) if i not in wrong]:
        like = min(right, key=lambda i: len(names[i] ^ names[one]))
        odd = min(names[like] ^ names[one], default="")
        has = "has" if odd in names[one] else "lacks"
        why = f"it {has} {one_line(odd, 80)}, unlike layer {layers[like].number}" if odd else why
    which = f"{layers[one].where}: layers {runs(layers[i].number for i in wrong)}"
    raise InputError(f"{which}: expected {made[one]:,} parameters, got {layers[one].parameters:,}: {why}")


def _format(dtype: str, sparse24: bool) -> str:
    return (dtype or "16 bits or more") + " as 2:4" * sparse24
