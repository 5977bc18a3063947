"""Describe a decoder-only transformer: a model is layers, a layer is sublayers.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from simulator.arguments import shown, whole
from simulator.arrays import FloatArray
from simulator.codes import DTYPES, Part
from simulator.display import Displayed
from simulator.errors import InputError, unknown
from simulator.models.pass_rows import Products
from simulator.models.sublayers import (
    Attention,
    DeltaNet,
    Experts,
    LatentAttention,
    LayerInputs,
    Mlp,
)
from simulator.models.sublayers.base import SharedSize, Sublayer, stacked

PARTS = {"attention": Part.ATTENTION, "mlp": Part.MLP}
"""Names of the parts of a layer."""

PART_NAMES = {part: name for name, part in PARTS.items()}

_MOST_WIDTH = 2**31 - 1
_CHOICES = {
    "norm": ("rms", "layer", "layer_without_bias", "none"),
    **dict.fromkeys(("weight_dtype", "dtype", "kv_dtype"), ("", *DTYPES)),
    "declared": ("", "2:4", "unstructured"),
}


@dataclass(frozen=True)
class Layer:
    """A decoder layer: sublayers one after the other, or side by side on one input."""

    sublayers: tuple[Sublayer, ...]
    parallel: bool = False  # all sublayers read the input of the layer (GPT-NeoX)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.sublayers, self.parallel))

    @cached_property
    def windowless(self) -> Layer:
        """The layer without its window; layers that differ in windows alone share their rows."""
        return self.with_window(0) if self.window else self

    def with_window(self, window: int) -> Layer:
        """Return the layer whose queries see ``window`` positions, 0 for all."""

        def attending(sublayer: Sublayer) -> Sublayer:
            if isinstance(sublayer, Attention | LatentAttention):
                return replace(sublayer, window=window)
            return sublayer

        return self.each(attending)

    @property
    def reused(self) -> bool:
        """Whether an earlier layer holds all its weights, as in models that repeat layers."""
        return bool(self.sublayers) and all(s.reused for s in self.sublayers)

    @property
    def window(self) -> int:
        """Positions that a query sees; 0 for all, and without attention."""
        return max(map(window_of, self.sublayers), default=0)

    def of(self, part: str) -> Sublayer | None:
        """Return the sublayer of a part, "attention" or "mlp", if the layer has it."""
        return next((s for s in self.sublayers if s.part == PARTS[part]), None)

    def has(self, part: str) -> bool:
        return self.of(part) is not None

    def without(self, part: str) -> Layer:
        return replace(self, sublayers=tuple(s for s in self.sublayers if s.part != PARTS[part]))

    def with_part(self, part: str, sublayer: Sublayer | None) -> Layer:
        """Return the layer with another sublayer of a part, or without it."""
        if sublayer is None:
            return self.without(part)
        sublayers = [*self.sublayers]
        if (old := self.of(part)) is not None:  # others of the part stay
            sublayers[sublayers.index(old)] = sublayer
        else:
            sublayers.insert(0 if part == "attention" else len(sublayers), sublayer)
        return replace(self, sublayers=tuple(sublayers))

    def joined(self, index: int) -> bool:
        """Return whether a sublayer reads the normed input of the sublayer before it."""
        return index > 0 and self.sublayers[index].joins

    def norms(self, index: int, before: bool, after: bool) -> tuple[bool, bool]:
        """Return whether a sublayer has a norm of its input and of its output, if the sublayers of
        the model usually have norms ``before`` and ``after``."""
        own = self.sublayers[index].norms
        before, after = (before, after) if own is None else own
        return before and not self.joined(index), after

    def each(self, change: Callable[[Sublayer], Sublayer]) -> Layer:
        return replace(self, sublayers=tuple(map(change, self.sublayers)))

    @property
    def structure(self) -> tuple[Any, ...]:
        """Key of layers that make the same rows, whose sizes alone differ."""
        return (self.parallel, *(sublayer.structure for sublayer in self.sublayers))


def stacked_layer(layers: Sequence[Layer]) -> Layer:
    """Return one layer of the structure of several, with arrays of their sizes."""
    if len(layers) == 1:
        return layers[0]
    sublayers = zip(*(layer.sublayers for layer in layers))
    return Layer(tuple(stacked(alike) for alike in sublayers), layers[0].parallel)


def _products(sublayer: Sublayer, hidden: int) -> Products:
    around = sublayer.entry.products(hidden) if sublayer.entry else {}
    return {**sublayer.products(hidden), **around}


def window_of(sublayer: Sublayer) -> int:
    return sublayer.window if isinstance(sublayer, Attention | LatentAttention) else 0


@dataclass(frozen=True)
class Run:
    """Consecutive layers that differ in their windows at most."""

    first: int  # number of the first layer
    layer: Layer  # without a window
    windows: tuple[int, ...]  # windows of each layer

    @property
    def length(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, repr=False)
class Model(Displayed):
    """The shapes of a decoder-only transformer.

    Make one with :func:`simulator.load_model`. Sizes such as ``heads`` are those of the usual
    layer, the most frequent complete one.

    Parameters
    ----------
    name : str
        Name of the model.
    architecture : str
        ``model_type`` of the configuration.
    hidden : int
        Hidden size.
    vocab : int
        Vocabulary size.
    layers : tuple of Layer
        Decoder layers, each a tuple of sublayers (:mod:`simulator.models.sublayers`).
    max_positions : int
        Positions that the model was trained for.
    tied : bool
        Whether the head shares the weights of the embedding.
    norm : {"rms", "layer", "layer_without_bias", "none"}
        Norm with a weight, with a weight and a bias, layer norm with a weight alone, or without
        parameters.
    pre_norms, post_norms : bool
        Whether each sublayer has a norm of its input, and of its output.
    final_norm : bool
        Whether a norm precedes the head.
    learned_positions : int
        Rows of a learned table of positions.
    logit_softcap : bool
        Whether logits are soft-capped.
    head_bias : bool
        Whether the head has a bias.
    head_projection : bool
        Whether a square product and a norm precede the head (ModernBERT).
    head_vocab : int
        Rows of a head that has fewer than the embedding, else 0.
    embedding_norm : bool
        Whether a norm follows the embedding.
    embedding_width : int
        Features of the embedding and the head, if projections map them to the hidden size and back;
        else 0.
    streams : int
        Residual streams, of which layers compute one (AltUp).
    other_parameters : int
        Parameters outside the layers that take part in no timed operator.
    weight_dtype : str
        Format in which a checkpoint stores its projections; "" for that of the arithmetic.
    dtype, kv_dtype : str
        Formats of the arithmetic and of the K/V cache that a checkpoint states; "" for those of the
        request.
    unread_format : str
        What is not understood of the number formats of a checkpoint, else "". A request must then
        state the format of the weights.
    declared : {"", "2:4", "unstructured"}
        Sparsity that the configuration declares for weights that are stored plainly. Declared 2:4
        is timed as 2:4 in engines with kernels for it, and as dense in others; unstructured
        sparsity is timed as dense.
    numbers : tuple of int
        Numbers of the layers in the dense model or in a checkpoint; empty for 0, 1, and so on.
    found : str
        Parts of the model that are not timed, and differences of a checkpoint from its
        configuration, in one line.
    mismatch : str
        Shapes of the tensors of a checkpoint that its configuration does not state; "" if it states
        all.
    custom_code : str
        Class of modelling code in the repository of the model (``auto_map``), else "".
    layer_key : str
        Key of the configuration that states single layers: block_configs, per_layer_config, else
        "".

    Raises
    ------
    InputError
        If a field is out of range.

    Examples
    --------
    >>> import simulator
    >>> model = simulator.load_model("llama-2-7b")
    >>> model.parameters, len(model.layers), model.heads
    (6738415616, 32, 32)
    """

    name: str
    architecture: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    max_positions: int
    tied: bool = False
    norm: str = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    final_norm: bool = True
    learned_positions: int = 0
    logit_softcap: bool = False
    head_bias: bool = False
    head_projection: bool = False
    head_vocab: int = 0
    embedding_norm: bool = False
    embedding_width: int = 0
    streams: int = 1
    other_parameters: int = 0
    weight_dtype: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    unread_format: str = ""
    declared: str = ""
    numbers: tuple[int, ...] = field(default=(), compare=False)
    found: str = field(default="", compare=False)
    mismatch: str = field(default="", compare=False)
    custom_code: str = field(default="", compare=False)
    layer_key: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("hidden", "vocab", "max_positions", "learned_positions"):
            value = whole(getattr(self, name))
            least = int(name != "learned_positions")
            if value is None or not least <= value <= _MOST_WIDTH:
                expected = f"a whole number from {least} to {_MOST_WIDTH}"
                raise InputError(f"{name}: expected {expected}, got {shown(getattr(self, name))}")
        if not isinstance(self.layers, tuple) or not all(isinstance(x, Layer) for x in self.layers):
            raise InputError(f"layers: expected a tuple of Layer, got {shown(self.layers)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.architecture, self.hidden, self.vocab, self.layers))

    def _title(self) -> str:
        shapes = (
            f"{len(self.layers)} layers, hidden {self.hidden}, {self.heads} heads on"
            f" {self.kv_heads}, MLP {self.inner}"
        )
        experts = f", {self.experts} experts" if self.experts else ""
        return (
            f"{self.name} ({self.architecture}): {self.parameters:,} parameters, {shapes}{experts}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes of the usual layer, fields of the model and numbers of parameters as
        plain Python values; each layer too if layers differ."""
        fields = super().to_dict()
        layers = fields.pop("layers")
        sizes = ("heads", "kv_heads", "head_dim", "inner", "experts", "active", "expert_inner")
        different = {"each_layer": layers} if len(set(self.layers)) > 1 else {}
        return {
            **fields,
            "layers": len(self.layers),
            **{name: getattr(self, name) for name in sizes},
            "windows": list(self.windows),
            **different,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
        }

    @cached_property
    def usual(self) -> Layer:
        """The most frequent complete layer: one of attention and an MLP or experts."""
        complete = [
            layer.windowless
            for layer in self.layers
            if any(isinstance(s, Attention | LatentAttention) for s in layer.sublayers)
            and isinstance(layer.of("mlp"), Mlp | Experts)
        ]
        layers = complete or [layer.windowless for layer in self.layers] or [Layer(())]
        return Counter(layers).most_common(1)[0][0]

    def _usual_of(self, kinds: Any) -> Any:
        """Return the sublayer of some kinds in the usual layer, else the most frequent one."""
        for layers in ((self.usual,), self.layers):
            sublayers = Counter(
                s for layer in layers for s in layer.windowless.sublayers if isinstance(s, kinds)
            )
            if sublayers:
                return sublayers.most_common(1)[0][0]
        return None

    @cached_property
    def attention(self) -> Attention | LatentAttention | DeltaNet | None:
        """The attention of the usual layer."""
        found: Attention | LatentAttention | DeltaNet | None
        found = self._usual_of(Attention | LatentAttention) or self._usual_of(DeltaNet)
        return found

    @cached_property
    def mlp(self) -> Mlp | Experts | None:
        """The MLP or the experts of the usual layer."""
        found: Mlp | Experts | None = self._usual_of(Mlp | Experts)
        return found

    @property
    def heads(self) -> int:
        """Query heads of the usual layer."""
        return self.attention.heads if self.attention else 0

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the usual layer."""
        return self.attention.kv_heads if self.attention else 0

    @property
    def head_dim(self) -> int:
        """Features of a query head of the usual layer."""
        attention = self.attention
        return attention.head_dim if isinstance(attention, Attention | LatentAttention) else 0

    @property
    def latent(self) -> LatentAttention | None:
        """The latent attention of the usual layer, if it has one."""
        return self.attention if isinstance(self.attention, LatentAttention) else None

    @property
    def routed(self) -> Experts | None:
        """The routed experts of the usual layer, else of the most frequent layer with some."""
        found: Experts | None = self._usual_of(Experts)
        return found

    @property
    def inner(self) -> int:
        """Inner width of the MLP of the usual layer; with routed experts, of the shared experts."""
        if isinstance(self.mlp, Experts):
            return self.mlp.shared_inner
        return self.mlp.inner if self.mlp else 0

    @property
    def experts(self) -> int:
        """Routed experts of the usual layer."""
        return self.routed.experts if self.routed else 0

    @property
    def active(self) -> float:
        """Routed experts that a token uses in the usual layer."""
        return self.routed.active if self.routed else 0.0

    @property
    def expert_inner(self) -> int:
        """Inner width of a routed expert of the usual layer."""
        return self.routed.inner if self.routed else 0

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding window of each layer in positions, 0 for full attention."""
        return tuple(layer.window for layer in self.layers)

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Numbers of the layers in the dense model."""
        return self.numbers or tuple(range(len(self.layers)))

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The sublayers of all layers in order."""
        return tuple(s for layer in self.layers for s in layer.sublayers)

    @property
    def sparse24(self) -> bool:
        """Whether projections are stored as 2:4."""
        return any(form.zeros == "2:4" for s in {*self.sublayers} for _, form in s.forms)

    @cached_property
    def products(self) -> tuple[Products, ...]:
        """Outputs and inputs of all linear products of each layer, and how many there are, by the
        number of the sublayer and role."""
        by_layer = {
            layer: {
                f"{index}.{role}": product
                for index, sublayer in enumerate(layer.sublayers)
                for role, product in _products(sublayer, self.hidden).items()
            }
            for layer in dict.fromkeys(self.layers)
        }
        return tuple(by_layer[layer] for layer in self.layers)

    @property
    def logits(self) -> int:
        """Outputs of the head."""
        return self.head_vocab or self.vocab

    @property
    def head_hidden(self) -> int:
        """Features that the final norm and the head read."""
        last = self.layers[-1].sublayers[-1:] if self.layers else ()
        return last[0].outputs(self.hidden) if last else self.hidden

    @cached_property
    def input_features(self) -> int:
        """Features of the inputs of all layers (:class:`LayerInputs`)."""
        return sum(run.length * inputs.width for run, inputs in self._layer_inputs)

    @property
    def input_tables(self) -> int:
        """Parameters of the tables of embeddings per layer."""
        return sum(run.length * inputs.width * inputs.vocab for run, inputs in self._layer_inputs)

    @property
    def _layer_inputs(self) -> list[tuple[Run, LayerInputs]]:
        pairs = ((run, s) for run in self.runs for s in run.layer.sublayers)
        return [(run, inputs) for run, inputs in pairs if isinstance(inputs, LayerInputs)]

    @cached_property
    def kinds(self) -> Mapping[str, int]:
        """Number of sublayers of each kind."""
        return Counter(s.label for s in self.sublayers if s.label)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Runs of layers that are equal except for their windows."""
        out = []
        first = 0
        for layer, some in itertools.groupby(self.layers, key=lambda one: one.windowless):
            windows = tuple(one.window for one in some)
            out.append(Run(first, layer, windows))
            first += len(windows)
        return tuple(out)

    @cached_property
    def stacks(self) -> tuple[tuple[tuple[int, ...], Layer], ...]:
        """Numbers of the runs whose layers have one structure, and one layer with arrays of their
        sizes."""
        members: dict[Any, list[int]] = {}
        for index, run in enumerate(self.runs):
            members.setdefault(run.layer.structure, []).append(index)
        return tuple(
            (tuple(alike), stacked_layer([self.runs[i].layer for i in alike]))
            for alike in members.values()
        )

    def each_layer(self, change: Callable[[Layer], Layer]) -> Model:
        """Return the model with every layer replaced by ``change(layer)``; equal layers are changed
        once."""
        changed = {layer: change(layer) for layer in dict.fromkeys(self.layers)}
        return replace(self, layers=tuple(changed[layer] for layer in self.layers))

    def with_layers(self, layers: Iterable[Layer], numbers: Sequence[int] = ()) -> Model:
        """Return the model with these layers; ``numbers`` are their numbers in the model that was
        pruned."""
        return replace(self, layers=tuple(layers), numbers=tuple(numbers))

    @cached_property
    def weight_counts(self) -> dict[tuple[str, str], FloatArray]:
        """Values that are not zero of the weights that pruning counts, by kind of sublayer and
        role, one per layer (L,); without biases."""
        counts: dict[tuple[str, str], FloatArray] = {}
        run_of_layer = np.repeat(np.arange(len(self.runs)), [run.length for run in self.runs])
        for members, layer in self.stacks:
            for sublayer in layer.sublayers:
                for role, count in sublayer.weight_counts(self.hidden).items():
                    by_run = counts.setdefault((sublayer.kind, role), np.zeros(len(self.runs)))
                    by_run[list(members)] = count
        return {role: by_run[run_of_layer] for role, by_run in counts.items()}

    @cached_property
    def weights(self) -> float:
        """Sum of :attr:`weight_counts`."""
        return float(sum(counts.sum() for counts in self.weight_counts.values()))

    def sizes(self, name: str) -> list[float]:
        """Return the different sizes of a name in all layers: "layers", or those of
        :meth:`simulator.models.sublayers.base.Sublayer.sizes`."""
        if name == "hidden size":
            return [self.hidden]
        if name.endswith("layers"):
            part = name.split()[0].lower()
            kinds = ({s.kind for s in run.layer.sublayers} | {"layers"} for run in self.runs)
            having = (run for run, known in zip(self.runs, kinds) if part in known)
            return [sum(run.length for run in having)]
        sizes = (s.sizes() for run in self.runs for s in run.layer.sublayers)
        return sorted({some[name] for some in sizes if name in some})

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over the hidden size."""
        return self.hidden * self._norm_vectors

    @property
    def _norm_vectors(self) -> int:
        return {"rms": 1, "layer": 2, "layer_without_bias": 1, "none": 0}[self.norm]

    def parameters_of(self, layer: Layer) -> int:
        """Return the parameters of one decoder layer."""
        hidden = self.hidden
        return sum(
            sublayer.parameters(hidden)
            + (sublayer.entry.parameters(hidden) if sublayer.entry else 0)
            + sublayer.rotates * hidden * sublayer.outputs(hidden)
            + sublayer.scales * hidden
            + sum(layer.norms(index, self.pre_norms, self.post_norms)) * self.norm_parameters
            for index, sublayer in enumerate(layer.sublayers)
            if not sublayer.reused
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(run.length * self.parameters_of(run.layer) for run in self.runs)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, exact; tied weights count once."""
        width = self.head_hidden
        embedded = self.embedding_width or self.hidden
        norms = self.final_norm + self.head_projection
        head = norms * width * self._norm_vectors + self.head_bias * self.logits
        head += self.head_projection * width * width
        head += 0 if self.tied else self.logits * (self.embedding_width or width)
        embedding = self.vocab * embedded + self.learned_positions * self.hidden
        embedding += self.embedding_norm * embedded * self._norm_vectors
        embedding += 2 * self.embedding_width * self.hidden
        embedding += 2 * (self.streams - 1) * self.hidden**2
        return self.layer_parameters + embedding + head + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: all except those of unused routed experts."""
        idle = 0.0
        for run in self.runs:
            mlp = run.layer.of("mlp")
            if isinstance(mlp, Experts):
                unused = mlp.experts - mlp.active
                idle += run.length * unused * mlp.expert_parameters(self.hidden)
        return self.parameters - round(idle)


def pruned_from(dense: Model, model: Model) -> Model:
    """Return a pruned model whose experts know how many there were in the dense model, as their
    skew depends on it."""
    before = dense.experts

    def known(sublayer: Sublayer) -> Sublayer:
        if isinstance(sublayer, Experts) and sublayer.experts < before:
            return replace(sublayer, trained=before)
        return sublayer

    return model.each_layer(lambda layer: layer.each(known)) if before else model


def shard(model: Model, devices: int, parallel: str) -> Model:
    """Return the model that one of ``devices`` computes; in a pipeline the whole model."""
    if devices == 1:
        return model
    if reason := indivisible(model, devices, parallel):
        raise InputError(f"devices {devices}: {model.name} has {reason}")
    if parallel == "pipeline":
        return model
    share = model.each_layer(lambda layer: layer.each(lambda s: s.share(devices, parallel)))
    # engines pad the last part
    head = -(-model.head_vocab // devices)
    return replace(share, vocab=-(-model.vocab // devices), head_vocab=head)


def indivisible(model: Model, devices: int, parallel: str) -> str:
    """Return why devices cannot divide a model equally, or ""."""
    if parallel == "pipeline":
        layers = len(model.layers)
        needs = "a pipeline has at most one device per layer"
        return f"{layers} layers; {needs}" if devices > layers else ""
    size = undivided(model.layers, devices, parallel)
    return size.reason(devices, parallel) if size else ""


def undivided(layers: Iterable[Layer], devices: int, parallel: str) -> SharedSize | None:
    """Return the first size of some layers that devices cannot divide equally."""
    sizes = (
        size
        for layer in dict.fromkeys(layers)
        for sublayer in layer.sublayers
        for size in sublayer.shared_sizes(parallel)
    )
    return next((size for size in sizes if not size.fits(devices)), None)
