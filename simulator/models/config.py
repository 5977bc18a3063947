"""Describe the shapes of a decoder-only transformer: one layer (:class:`Block`), the model
(:class:`ModelConfig`) with its parameters, and the shapes that each of several devices computes
(:func:`shard`).

*Tensor* parallel splits every layer: each device gets an equal part of the query heads, key/value
heads, inner width of the MLP and vocabulary. The residual stream is complete on each device. The
row-parallel projections (o, down) and the split embedding end in an all-reduce, the logits in an
all-gather (M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053). Key/value heads are replicated if
there are more devices. Rows and their parameters then describe one device.

*Expert* parallel is tensor parallel except for routed experts. Each device has an equal number of
complete experts and computes all tokens that use them; the others wait for the device with the
highest load. The same all-reduce sums the outputs. Attention is not split by sequences, so every
device has all tokens and nothing is sent before the experts.

*Pipeline* parallel gives each device consecutive layers. One micro-batch passes all stages one
after the other, so its latency is that of one device plus ``devices - 1`` sends. Rows then describe
the whole model; only memory is counted per device (:func:`simulator.memory`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from simulator.arguments import AMOUNT, number, shown, whole
from simulator.codes import DTYPES
from simulator.display import Displayed
from simulator.errors import InputError, unknown


@dataclass(frozen=True)
class Block:
    """Shapes of one decoder layer; a width of 0 means that the layer has no such sublayer."""

    heads: int  # query heads; in a gated delta net, value heads
    kv_heads: int  # key/value heads; in a gated delta net, key heads
    inner: int  # inner width of the MLP; with routed experts, inner width of the shared experts
    experts: int = 0  # routed experts
    active: float = 0.0  # routed experts that a token uses, on one device on average
    expert_inner: int = 0
    rotary: bool = True  # queries and keys are rotated
    # sublayers ("attention", "mlp") that one hidden x hidden product replaces
    linear: tuple[str, ...] = ()
    delta: bool = False  # a gated delta net instead of attention
    # projections (roles) that are stored as two factors, and their ranks
    ranks: tuple[tuple[str, int], ...] = ()
    # sublayers whose residual a hidden x hidden product rotates (SliceGPT)
    shortcuts: tuple[str, ...] = ()
    out: int = 0  # features after the layer; 0: the hidden size

    @property
    def sublayers(self) -> int:
        """Number of sublayers, attention and MLP, each with its norms."""
        return bool(self.heads or "attention" in self.linear) + bool(
            self.inner or self.experts or "mlp" in self.linear
        )

    def weights(self, role: str, n: int, k: int) -> int:
        """Return the number of weights in a projection of n outputs and k inputs, possibly stored
        as two factors."""
        rank = self.rank(role)
        return rank * (n + k) if rank else n * k

    def rank(self, role: str) -> int:
        return dict(self.ranks).get(role, 0)

    def roles(self, fused: str, parts: Mapping[str, int], fuses: bool = False) -> Mapping[str, int]:
        """Return the projections (role -> outputs) that compute ``parts``: each part, or all as
        ``fused``. Factors are stored as they are, also in an engine that ``fuses`` projections."""
        stored = {role for role, _ in self.ranks}
        if fused in stored or (fuses and not stored & parts.keys()):
            return {fused: sum(parts.values())}
        return parts


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one vector per position gives
    keys and values."""

    query_rank: int  # rank of the queries; 0: one projection makes them
    rank: int  # rank of the cached vector
    rotary: int  # rotated features of a query head, and of the key that all heads share
    plain: int  # other features of a query or key head
    value: int  # features of a value head

    @property
    def cached(self) -> int:
        return self.rank + self.rotary


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta net (arXiv 2412.06464): a state of key x value features per value head instead of
    a cache."""

    key: int  # features of a query or key head
    value: int  # features of a value head
    conv: int  # positions of the causal convolution of queries, keys and values

    def widths(self, block: Block) -> tuple[int, int]:
        return block.kv_heads * self.key, block.heads * self.value


# fields of a model and of a layer
_WIDTHS = ("heads", "kv_heads", "inner", "experts", "active", "expert_inner")
_MOST_WIDTH = 2**31 - 1
_POSITIVE = ("hidden", "head_dim", "vocab", "max_positions")  # whole numbers from 1
_COUNTS = (
    "layers",
    "heads",
    "kv_heads",
    "inner",
    "rotary_dim",
    "learned_positions",
    "experts",
    "expert_inner",
)
_CHOICES = {
    "norm": ("rms", "layer", "none"),
    "qk_norm": ("", "head", "width", "unit"),
    "weight_dtype": ("", *DTYPES),
    "declared": ("", "2:4", "unstructured"),
}


def layer_fields(blocks: Sequence[Block]) -> dict[str, Any]:
    """Return the widths of the most frequent complete layer as fields of a model, and ``blocks`` if
    layers differ."""
    complete = [
        b for b in blocks if b.heads and (b.inner or b.experts) and not (b.linear or b.delta)
    ] or blocks
    usual = Counter(complete).most_common(1)[0][0]
    fields: dict[str, Any] = {name: getattr(usual, name) for name in _WIDTHS}
    return fields | {"blocks": () if set(blocks) == {Block(**fields)} else tuple(blocks)}


@dataclass(frozen=True, repr=False)
class ModelConfig(Displayed):
    """The shapes of a decoder-only transformer.

    Make one with :func:`simulator.load_model`. If layers differ, the widths below are those of the
    most frequent complete layer, and ``blocks`` has the widths of each layer.

    Parameters
    ----------
    name : str
        Name of the model.
    architecture : str
        ``model_type`` of the configuration.
    hidden, layers : int
        Hidden size, and number of decoder layers.
    heads, kv_heads, head_dim : int
        Query heads, key/value heads, and features per head.
    inner : int
        Inner width of the MLP; with routed experts, of the shared experts.
    vocab : int
        Vocabulary size.
    rotary_dim : int
        Features per head that are rotated, 0 for none.
    max_positions : int
        Positions that the model was trained for.
    windows : tuple of int
        Sliding window of each layer in positions, 0 for full attention.
    gated : bool
        Whether the MLP has gate, up and down projections; else up and down.
    tied : bool
        Whether the head shares the weights of the embedding.
    qkv_bias, o_bias, mlp_bias, down_bias : bool
        Which projections have biases; ``down_bias`` is for an MLP without other biases.
    qk_norm : {"", "head", "width", "unit"}
        RMS norm of queries and keys: none, per head, over all heads together, or per head without
        weights and only in layers with rotary positions.
    norm : {"rms", "layer", "none"}
        Norm with a weight, with a weight and a bias, or a layer norm without parameters.
    pre_norms, post_norms : bool
        Whether attention and MLP have a norm of their input, and of their output.
    final_norm : bool
        Whether a norm precedes the head.
    parallel_residual : bool
        Whether attention and MLP both read the input of the layer.
    learned_positions : int
        Rows of a learned table of positions.
    attention_softcap, logit_softcap : bool
        Whether scores of attention, and logits, are soft-capped.
    latent : Latent, optional
        Multi-head latent attention.
    experts : int
        Routed experts per layer.
    active : float
        Routed experts that a token uses.
    expert_inner : int
        Inner width of a routed expert.
    router_bias, expert_bias : bool
        Whether the router, and the routed experts, have biases.
    shared_gate : bool
        Whether a scalar weighs the shared experts.
    sinks : bool
        Whether each head has a learned logit in addition to its keys.
    output_gate : bool
        Whether the query projection also makes a gate of the outputs of attention.
    delta : DeltaNet, optional
        Gated delta net of the layers that have one instead of attention.
    blocks : tuple of Block
        Each layer, if layers differ.
    weight_dtype : str
        Format in which a checkpoint stores its projections; "" for that of the arithmetic.
    sparse24 : bool
        Whether the projections are stored as 2:4.
    declared : {"", "2:4", "unstructured"}
        Sparsity that the configuration declares for weights that are stored plainly. Declared 2:4
        is timed as 2:4 in engines with kernels for it, and as dense in others; unstructured
        sparsity is timed as dense.
    numbers : tuple of int
        Numbers of the layers in a checkpoint.
    found : str
        Parts of the model that are not timed, and differences of a checkpoint from its
        configuration, in one line.
    mismatch : str
        Shapes of the tensors of a checkpoint that its configuration does not state; "" if it states
        all.
    custom_code : str
        Class of modelling code in the repository of the model (``auto_map``), else "".

    Raises
    ------
    InputError
        If a field is out of range.

    Examples
    --------
    >>> import simulator
    >>> simulator.load_model("llama-2-7b").parameters
    6738415616
    """

    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    rotary_dim: int
    max_positions: int
    windows: tuple[int, ...]
    gated: bool = True
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    down_bias: bool = False
    qk_norm: str = ""
    norm: str = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    final_norm: bool = True
    parallel_residual: bool = False
    learned_positions: int = 0
    attention_softcap: bool = False
    logit_softcap: bool = False
    latent: Latent | None = None
    experts: int = 0
    active: float = 0.0
    expert_inner: int = 0
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False
    output_gate: bool = False
    delta: DeltaNet | None = None
    blocks: tuple[Block, ...] = ()
    weight_dtype: str = ""
    sparse24: bool = False
    declared: str = ""
    numbers: tuple[int, ...] = field(default=(), compare=False)
    found: str = field(default="", compare=False)
    mismatch: str = field(default="", compare=False)
    custom_code: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in (*_POSITIVE, *_COUNTS):
            found, least = whole(getattr(self, name)), int(name in _POSITIVE)
            if found is None or not least <= found <= _MOST_WIDTH:
                expected = f"a whole number from {least} to {_MOST_WIDTH}"
                raise InputError(f"{name}: expected {expected}, got {shown(getattr(self, name))}")
        number("active", self.active, AMOUNT)
        windows = self.windows
        if (
            not isinstance(windows, tuple)
            or len(windows) != self.layers
            or any((whole(w) or 0) < 0 for w in windows)
        ):
            expected = f"a tuple of {self.layers} positions, one per layer"
            raise InputError(f"windows: expected {expected}, got {shown(windows)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)

    def _title(self) -> str:
        shapes = (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads on {self.kv_heads},"
            f" MLP {self.inner}"
        )
        experts = f", {self.experts} experts" if self.experts else ""
        return (
            f"{self.name} ({self.architecture}): {self.parameters:,} parameters, {shapes}{experts}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, and the numbers of parameters."""
        return super().to_dict() | {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
        }

    @property
    def usual(self) -> Block:
        """Shapes of the usual layer."""
        return Block(**{name: getattr(self, name) for name in _WIDTHS})

    @property
    def head_hidden(self) -> int:
        """Features that the final norm and the head read."""
        return self.layout[-1].out if self.layout and self.layout[-1].out else self.hidden

    def with_usual(self, usual: Block, blocks: tuple[Block, ...]) -> ModelConfig:
        """Return the model with another usual layer and other ``blocks``."""
        return replace(self, blocks=blocks, **{name: getattr(usual, name) for name in _WIDTHS})

    @cached_property
    def layout(self) -> tuple[Block, ...]:
        """Shapes of each layer."""
        return self.blocks or (self.usual,) * self.layers

    @cached_property
    def runs(self) -> tuple[tuple[int, int, Block], ...]:
        """First layer, number of layers and shapes of each run of equal layers."""
        out, first = [], 0
        for block, same in itertools.groupby(self.layout):
            many = len(list(same))
            out.append((first, many, block))
            first += many
        return tuple(out)

    def each_block(self, change: Callable[[Block], Block]) -> ModelConfig:
        """Return the model with every layer, and the usual layer, changed by ``change``."""
        return self.with_usual(change(self.usual), tuple(map(change, self.blocks)))

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over the hidden size."""
        return self.hidden * self._norm_vectors

    @property
    def _norm_vectors(self) -> int:
        return {"rms": 1, "layer": 2, "none": 0}[self.norm]

    def attention_parameters(self, block: Block) -> int:
        """Return the parameters of the attention of a ``block``, without norms of the residual
        stream."""
        h, d, own = self.hidden, self.head_dim, self.latent
        if "attention" in block.linear:
            return h * h
        if not block.heads:
            return 0
        rotates = ("attention" in block.shortcuts) * h * h
        if block.delta:
            return self._delta_parameters(block) + rotates
        if own is not None:
            queries = h * block.heads * d
            if own.query_rank:
                queries = h * own.query_rank + own.query_rank + own.query_rank * block.heads * d
            keys = h * own.cached + own.rank + own.rank * block.heads * (own.plain + own.value)
            return queries + keys + block.heads * own.value * h
        q, kv = block.heads * d, block.kv_heads * d
        norms = {"head": 2 * d, "width": q + kv}.get(self.qk_norm, 0)
        made = {"q": (1 + self.output_gate) * q, "k": kv, "v": kv}
        inputs = block.roles("qkv", made).items()
        weights = sum(block.weights(role, n, h) for role, n in inputs) + block.weights("o", h, q)
        biases = self.qkv_bias * sum(made.values()) + self.o_bias * h
        return weights + biases + norms + self.sinks * block.heads + rotates

    def _delta_parameters(self, block: Block) -> int:
        own = self.delta
        assert own is not None
        keys, values = own.widths(block)
        projections = self.hidden * (2 * keys + 3 * values + 2 * block.heads)
        return projections + own.conv * (2 * keys + values) + 2 * block.heads + own.value

    def mlp_parameters(self, block: Block) -> int:
        """Return the parameters of the MLP of a ``block``, with routed experts, without norms."""
        h, wide = self.hidden, 2 if self.gated else 1
        if "mlp" in block.linear:
            return h * h
        out, inner = block.out or h, block.inner
        made = {"gate": inner, "up": inner} if self.gated else {"up": inner}
        inputs = block.roles("gate_up", made).items()
        weights = sum(block.weights(role, n, h) for role, n in inputs)
        weights += block.weights("down", out, inner)
        biases = self.mlp_bias * wide * inner + (self.mlp_bias or self.down_bias) * out
        dense = (inner > 0) * (weights + biases) + ("mlp" in block.shortcuts) * h * out
        if not block.experts:
            return dense
        router = (h + self.router_bias) * block.experts + (block.inner > 0) * self.shared_gate * h
        return dense + router + block.experts * self.expert_parameters(block)

    def expert_parameters(self, block: Block) -> int:
        """Return the parameters of one routed expert of a ``block``."""
        return 3 * self.hidden * block.expert_inner + self.expert_bias * (
            2 * block.expert_inner + self.hidden
        )

    def block_parameters(self, block: Block) -> int:
        """Return the parameters of one decoder layer, a ``block``."""
        norms = block.sublayers * (self.pre_norms + self.post_norms) * self.norm_parameters
        return self.attention_parameters(block) + self.mlp_parameters(block) + norms

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(many * self.block_parameters(block) for _, many, block in self.runs)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, exact; tied weights count once."""
        width = self.head_hidden
        head = self.final_norm * width * self._norm_vectors + (
            0 if self.tied else self.vocab * width
        )
        return self.layer_parameters + (self.vocab + self.learned_positions) * self.hidden + head

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: all except those of unused routed experts."""
        idle = (
            many * (b.experts - b.active) * self.expert_parameters(b)
            for _, many, b in self.runs
            if b.experts
        )
        return self.parameters - round(sum(idle))


def shard(model: ModelConfig, devices: int, parallel: str) -> ModelConfig:
    """Return the model that one of ``devices`` computes; in a pipeline the whole model."""
    where = f"devices {devices}: {model.name} has"
    if parallel == "pipeline" and devices > model.layers:
        raise InputError(
            f"{where} {model.layers} layers; a pipeline has at most one device per layer"
        )
    if parallel == "pipeline" or devices == 1:
        return model

    def of_block(block: Block) -> Block:
        if reason := indivisible(block, devices, parallel):
            raise InputError(f"{where} {reason}")
        heads, kv_heads = (
            block.heads // devices,
            max(block.kv_heads // devices, int(block.heads > 0)),
        )
        share = replace(block, heads=heads, inner=block.inner // devices, kv_heads=kv_heads)
        if not block.experts:
            return share
        if parallel == "expert":
            return replace(share, experts=block.experts // devices, active=block.active / devices)
        return replace(share, expert_inner=block.expert_inner // devices)

    # engines pad the last part
    return replace(model.each_block(of_block), vocab=-(-model.vocab // devices))


def indivisible(block: Block, devices: int, parallel: str) -> str:
    """Return why tensor or expert parallel cannot divide a layer equally among devices, or ""."""
    sizes = {"{} attention heads": block.heads, "an MLP width of {}": block.inner}
    if block.experts and parallel == "expert":
        sizes["{} experts"] = block.experts
    elif block.experts:
        sizes["experts of a width of {}"] = block.expert_inner
    for what, size in sizes.items():
        if size % devices:
            return f"{what.format(size)}; {parallel} parallel needs a multiple of {devices}"
    few, many = sorted((block.kv_heads, devices))
    if few and many % few:
        return (
            f"{block.kv_heads} key/value heads; {parallel} parallel needs a multiple or a divisor"
            f" of {devices}"
        )
    return ""
