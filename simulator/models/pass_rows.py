"""Make the rows of operators of one kind of pass: :class:`PassRows`.

Sublayers and :mod:`simulator.models.lower` make their rows with it. Sizes may be arrays with one
value per run of layers, so that layers of one structure share the work; a row then stands for as
many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from simulator.codes import DTYPE_BYTES, Kind, Part, Phase, dtype_code
from simulator.engines.engine import Engine
from simulator.models.form import PLAIN, SPARSE24, Form, alike, present
from simulator.request import Lowered

_QUANTIZE = {
    "qkv": "quantize",
    "gate_up": "quantize",
    "o": "quantize_heads",
    "down": "quantize_inner",
}
"""Role of the conversion of a product's activations."""

_MXFP4 = dtype_code("mxfp4")
STATE = dtype_code("fp32")
"""Format of the recurrent state of a delta net, as Transformers and SGLang keep it."""

COMPRESSED = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "delta_in")
"""Weights that a 2:4 checkpoint compresses."""

OperatorRow = dict[str, Any]
OperatorRows = Iterator[OperatorRow]

Shapes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of weights by role."""

Products = Mapping[str, tuple[int, int, int]]
"""Outputs and inputs of linear products, and how many there are, by role."""


def elements(products: Products) -> int:
    """Return the number of weights of linear products."""
    return sum(n * k * many for n, k, many in products.values())


class Weights(Protocol):
    """What rows need to know of a sublayer: its part, and how its weights are stored."""

    @property
    def part(self) -> Part: ...

    @property
    def rotates(self) -> bool: ...

    def weights(self, hidden: int) -> Shapes: ...

    def form(self, role: str) -> Form: ...

    def stores(self, role: str) -> bool: ...


@dataclass(frozen=True)
class Lowering:
    """A request with its engine, the codes of its number formats, and the features of the residual
    stream."""

    request: Lowered
    engine: Engine
    dtype: int
    weight_dtype: int
    cache_dtype: int
    stream_dtype: int
    hidden: int
    norm_parameters: int  # parameters of a norm over the residual stream
    pre_norms: bool
    post_norms: bool
    declared24: bool  # whether dense weights that are declared 2:4 run as 2:4
    ideal: bool  # whether the work that pruning adds is excluded

    @property
    def split(self) -> bool:
        """Whether each layer is split over several devices."""
        return self.request.devices > 1 and self.request.parallel != "pipeline"

    @property
    def quantised(self) -> tuple[str, ...]:
        """Products whose activations a further kernel converts."""
        return self.engine.quantize.inputs if DTYPE_BYTES[self.dtype] < 2.0 else ()


@dataclass(frozen=True)
class PassRows:
    """Rows of equal prefill passes, or of the decode steps of a request."""

    lowering: Lowering
    phase: Phase
    batch: int  # sequences
    q_len: int
    steps: float  # executions of the pass; in the steady state of ``serve`` their mean
    first: bool = True  # whether it is the first pass of its phase, whose rows have the parameters

    @property
    def request(self) -> Lowered:
        return self.lowering.request

    @property
    def hidden(self) -> int:
        return self.lowering.hidden

    @property
    def tokens(self) -> int:
        return self.batch * self.q_len

    @property
    def decodes(self) -> bool:
        return self.phase == Phase.DECODE

    @property
    def mean_length(self) -> float:
        """Mean cache length of the decode steps, with the added position."""
        return self.request.seq + (self.steps + 1) / 2

    @property
    def mean_positions(self) -> int:
        """Mean cached positions of each sequence with those of this pass."""
        return int(self.mean_length) if self.decodes else self.q_len

    @property
    def wide(self) -> OperatorRow:
        """Formats of products that are never quantised."""
        return {"dtype": self.lowering.stream_dtype, "weight_dtype": self.lowering.stream_dtype}

    @property
    def owns(self) -> float:
        """Share of the parameters that each execution of the rows counts."""
        counts = self.phase == Phase.PREFILL or self.request.phase == "decode"
        return self.first * counts / self.steps

    def kept(self, positions: int) -> int:
        """Return the last positions of a convolution that the cache holds: Transformers also keeps
        the first, which the next token does not need."""
        return positions - (self.lowering.engine.cache == "paged")

    def fuses(self, group: str) -> bool:
        return group in self.lowering.engine.fuse

    def gemm(
        self, role: str, part: Part, n: Any, k: Any, form: Form = PLAIN, bias: bool = False
    ) -> OperatorRow:
        """Return a product of n outputs and k inputs."""
        weights = self.lowering.weight_dtype
        only_experts = weights == _MXFP4 and self.lowering.dtype != _MXFP4
        if only_experts and role != "experts":
            weights = self.lowering.stream_dtype
        if self.lowering.declared24 and role in COMPRESSED:
            form = SPARSE24
        owns = self.owns
        row = {
            "role": role,
            "part": part,
            "m": self.tokens,
            "n": n,
            "k": k,
            "params": form.density * n * k * owns + (n if bias else 0) * owns,
            "dtype": self.lowering.dtype,
            "weight_dtype": weights,
        }
        if form.zeros:
            row["kernel"] = form.kernel(self.tokens)
            row["density"] = form.density
        return row

    def wide_gemm(self, role: str, part: Part, n: Any, k: Any) -> OperatorRow:
        """Return a product that is never quantised."""
        return self.gemm(role, part, n, k) | self.wide

    def product(
        self, sublayer: Weights, role: str, n: Any, k: Any, bias: bool = False
    ) -> OperatorRows:
        """Yield the product of a weight of a sublayer, or the two products of its factors."""
        form = sublayer.form(role)
        if form.rank is None:
            yield self.gemm(role, sublayer.part, n, k, form, bias)
        else:
            yield self.gemm(role, sublayer.part, form.rank, k, form) | {"stage": 1}
            yield self.gemm(role, sublayer.part, n, form.rank, form, bias) | {"stage": 2}

    def products(
        self,
        sublayer: Weights,
        fused: str,
        outputs: Mapping[str, Any],
        k: Any,
        bias: bool,
        fuses: bool,
    ) -> OperatorRows:
        """Yield the products of several weights (role -> outputs) that read one input.

        An engine that ``fuses`` runs them as one product if they are stored alike. Factors are
        never fused."""
        together = sum(outputs.values())
        if sublayer.stores(fused):
            yield from self.product(sublayer, fused, together, k, bias)
        elif fuses and alike([sublayer.form(role) for role in outputs]):
            form = sublayer.form(next(iter(outputs)))
            yield self.gemm(fused, sublayer.part, together, k, form, bias)
        else:
            for role, n in outputs.items():
                yield from self.product(sublayer, role, n, k, bias)

    def quantized(self, product: str, part: Part, k: Any) -> OperatorRows:
        """Yield the conversion of a product's activations, if a further kernel does it."""
        lowering = self.lowering
        if product in lowering.quantised:
            written = k * float(DTYPE_BYTES[lowering.dtype] / DTYPE_BYTES[lowering.stream_dtype])
            yield self.move(_QUANTIZE[product], part, k, k, written)

    def weight(self, sublayer: Weights, role: str, bias: bool = False) -> OperatorRows:
        """Yield the product of a weight of a sublayer, of its usual shape."""
        yield from self.product(sublayer, role, *sublayer.weights(self.hidden)[role], bias)

    def output(self, sublayer: Weights, bias: bool = False) -> OperatorRows:
        """Yield the output projection of a mixer, after the conversion of its inputs."""
        _, inputs = sublayer.weights(self.hidden)["o"]
        yield from self.quantized("o", sublayer.part, inputs)
        yield from self.weight(sublayer, "o", bias)

    def residual_projection(self, sublayer: Weights, n: Any) -> OperatorRows:
        """Yield the product that rotates the residual of a sublayer, which pruning (SliceGPT)
        adds."""
        if sublayer.rotates and not self.lowering.ideal:
            row = self.gemm("residual_projection", sublayer.part, n, self.hidden)
            yield row | {"dtype": self.lowering.stream_dtype, "overhead": True}

    def norm_before(self, role: str, part: Part, adds: bool = True) -> OperatorRow:
        """Return the norm before a sublayer; it ``adds`` the residual, unless sublayers read the
        same input."""
        features = self.hidden
        moved = 2 * features if adds else features
        return self.move(role, part, features, moved, moved, self.lowering.norm_parameters)

    def norm_after(self, part: Part, adds: bool) -> OperatorRow:
        """Return the norm of a sublayer's output; it ``adds`` the residual if no norm precedes the
        next sublayer."""
        features = self.hidden
        read = 2 * features if adds else features
        return self.move("post_norm", part, features, read, features, self.lowering.norm_parameters)

    def kernel(self, kind: Kind, role: str, part: Part, **columns: Any) -> OperatorRow:
        """Return a row that reads and writes the format of the residual stream, unless its columns
        state another."""
        stream = self.lowering.stream_dtype
        formats = {"dtype": stream, "weight_dtype": stream}
        return {"kind": kind, "role": role, "part": part, **formats, **columns}

    def move(
        self,
        role: str,
        part: Part,
        n: Any,
        read: Any = None,
        write: Any = None,
        params: Any = 0,
        tokens: int = 0,
    ) -> OperatorRow:
        """Return an elementwise row over ``tokens`` positions of ``n`` features; reads and writes
        are in elements, by default the features."""
        tokens = tokens or self.tokens
        size = float(tokens * DTYPE_BYTES[self.lowering.stream_dtype])
        return self.kernel(
            Kind.ELEMENTWISE,
            role,
            part,
            m=tokens,
            n=n,
            params=params * self.owns,
            read_bytes=size * (n if read is None else read),
            write_bytes=size * (n if write is None else write),
        )

    def rotary(self, features: Any) -> OperatorRows:
        """Yield the rotation of ``features`` of queries and keys."""
        if present(features):
            yield self.move("rotary", Part.ATTENTION, features)

    def cache_write(self, elements: Any, heads: Any, kv_heads: Any) -> OperatorRow:
        """Return the row that writes the cache; a joined cache is extended, a copied one is then
        repeated for every query head."""
        lowering = self.lowering
        read = elements * 1.0
        write = elements * float(
            DTYPE_BYTES[lowering.cache_dtype] / DTYPE_BYTES[lowering.stream_dtype]
        )
        positions = {}
        if lowering.engine.cache != "paged" and self.decodes:
            shares = (lowering.engine.cache == "copied") & (heads > kv_heads)
            repeats = shares * (heads // kv_heads)
            copied = self.mean_length * (1 + repeats)
            reads = copied + self.mean_length * shares
            read = read + write * reads
            write = write * copied
            positions = {"kv_len": int(self.mean_length)}
        row = self.move("cache_write", Part.ATTENTION, elements, read, write)
        return row | {"weight_dtype": lowering.cache_dtype, **positions}

    def attend(self, heads: Any, **sizes: Any) -> OperatorRow:
        """Return attention; its cache lengths and windows are set later."""
        kind = Kind.DECODE_ATTENTION if self.decodes else Kind.PREFILL_ATTENTION
        row = self.kernel(
            kind,
            "attention",
            Part.ATTENTION,
            weight_dtype=self.lowering.cache_dtype,
            heads=heads,
            batch=self.batch,
            q_len=self.q_len,
        )
        return row | sizes

    def recurrence(
        self, role: str, heads: Any, groups: Any, state: Any, channels: Any, **others: Any
    ) -> OperatorRow:
        """Return the recurrence of a state per head, ``channels`` x ``state``; ``groups`` of heads
        share keys and queries."""
        row = self.kernel(
            Kind.STATE_SPACE,
            role,
            Part.ATTENTION,
            weight_dtype=STATE,
            m=self.tokens,
            n=heads * channels,
            batch=self.batch,
            heads=heads,
            kv_heads=groups,
            head_dim=state,
            value_dim=channels,
        )
        return row | others

    def collective(self, role: str, part: Part, tokens: int, width: Any) -> OperatorRows:
        """Yield the collective whose payload is (tokens, width); none on one device."""
        if self.lowering.split:
            stream = self.lowering.stream_dtype
            yield {
                "kind": Kind.COLLECTIVE,
                "role": role,
                "part": part,
                "m": tokens,
                "n": width,
                "dtype": stream,
                "batch": self.request.devices,
                "read_bytes": tokens * width * DTYPE_BYTES[stream],
            }

    def send(self) -> OperatorRows:
        """Yield a pipeline's sends of the residual stream, each between two devices; layer pruning
        keeps them."""
        if self.request.devices > 1 and not self.lowering.split:
            stream = self.lowering.stream_dtype
            yield {
                "kind": Kind.COLLECTIVE,
                "role": "send",
                "part": Part.HEAD,
                "m": self.tokens,
                "n": self.hidden,
                "batch": 2,
                "read_bytes": self.tokens * self.hidden * float(DTYPE_BYTES[stream]),
                "count": self.request.devices - 1,
            }
