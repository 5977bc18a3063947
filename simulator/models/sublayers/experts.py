"""Routed experts, with the experts that all tokens share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from simulator.codes import ELEMENTWISE, Kind, Part
from simulator.models.form import present
from simulator.models.pass_rows import OperatorRow, PassRows
from simulator.models.sublayers.base import SharedSize, Sublayer, aligned
from simulator.models.sublayers.mlp import Mlp

SCORE_BYTES = 4.0  # bytes of a score or an index: fp32 or int32


@dataclass(frozen=True, kw_only=True)
class Experts(Sublayer):
    """A router and its experts; a token uses some of them."""

    SIZES: ClassVar[tuple[str, ...]] = (
        *("experts", "active", "inner", "outputs_of_router", "trained", "choices"),
        "shared_inner",
    )
    WHOLE: ClassVar[tuple[str, ...]] = ("experts",)

    experts: int
    active: float  # experts that a token uses; on one of several devices, on average
    inner: int  # inner width of an expert
    shared_inner: int = 0  # inner width of the MLP that all tokens use; 0: none
    shared_bias: bool = False  # biases of all projections of that MLP
    shared_gate: bool = False  # a scalar weighs that MLP
    router_bias: bool = False
    bias: bool = False  # of the experts
    outputs_of_router: int = 0  # of a router whose choices a table maps to merged experts
    trained: float = 0  # experts of the model before pruning, which determine the skew; 0: the same
    # choices of the router per token that a kernel maps to experts (merging, a number per token);
    # 0: a token uses its choices
    choices: float = 0.0

    @property
    def part(self) -> Part:
        return Part.MLP

    @property
    def shared(self) -> Mlp | None:
        """The MLP that all tokens use."""
        if not present(self.shared_inner):
            return None
        return Mlp(inner=self.shared_inner, bias=self.shared_bias, forms=self.forms)

    @property
    def routes(self) -> int:
        """Outputs of the router."""
        return self.outputs_of_router if present(self.outputs_of_router) else self.experts

    def expert_parameters(self, hidden: int) -> int:
        """Return the parameters of one routed expert."""
        return 3 * hidden * self.inner + self.bias * (2 * self.inner + hidden)

    def weights(self, hidden: int) -> Mapping[str, tuple[int, int]]:
        shared = self.shared.weights(hidden) if self.shared is not None else {}
        return {**shared, "experts": (self.experts * self.expert_parameters(hidden), 1)}

    def parameters(self, hidden: int) -> int:
        router = (hidden + self.router_bias) * self.routes
        routed = self.experts * self.expert_parameters(hidden)
        if self.shared is None:
            return router + routed
        return router + routed + self.shared.parameters(hidden) + self.shared_gate * hidden

    def shared_sizes(self, parallel: str) -> tuple[SharedSize, ...]:
        shared = SharedSize("an MLP width of {}", self.shared_inner, "width mlp={}")
        if parallel == "expert":
            return shared, SharedSize("{} experts", self.experts, "experts {}")
        return shared, SharedSize("experts of a width of {}", self.inner, "width mlp={}")

    def share(self, devices: int, parallel: str) -> Experts:
        alike = replace(self, shared_inner=self.shared_inner // devices)
        if parallel == "expert":
            return replace(
                alike,
                experts=self.experts // devices,
                active=self.active / devices,
                choices=self.choices / devices,
                outputs_of_router=self.routes,
                trained=self.trained / devices,
            )
        return replace(alike, inner=self.inner // devices)

    def fewer(self, experts: int, **changes: Any) -> Experts:
        """Return the sublayer with fewer experts; its skew follows from the trained number."""
        return replace(self, experts=experts, trained=self.trained or self.experts, **changes)

    def skew(self, skew: float) -> Any:
        """Return the skew of the experts that stay. They have similar loads: 64 of Qwen3-30B's 128
        have a skew of 0.57, all have 0.84 (EXPERT_SKEW). The loads of merged experts add up, so
        their spread falls with the square root of a group's size."""
        before = np.where(self.trained, self.trained, self.experts)
        return skew * np.sqrt(np.minimum(self.experts / np.maximum(before, 1), 1.0))

    def sizes(self) -> Mapping[str, float]:
        shared = {"inner width": self.shared_inner} if self.shared_inner else {}
        return {**shared, "experts": self.experts, "expert width": self.inner}

    def narrower(self, shares: Mapping[str, float], align: int, inner: int | None) -> Experts:
        if not shares["mlp"]:
            return self
        shared = self.shared_inner
        if shared:
            shared = inner or aligned(shared, shares["mlp"], align)
        return replace(self, inner=aligned(self.inner, shares["mlp"], align), shared_inner=shared)

    def rows(self, p: PassRows) -> Iterator[OperatorRow]:
        part, hidden = self.part, p.hidden
        shared = self.shared
        if shared is not None:
            yield from shared.rows(p)
            if self.shared_gate:
                yield p.gemm("shared_gate", part, 1, hidden) | p.wide
        router = p.gemm("router", part, self.routes, hidden) | p.wide
        if self.router_bias:
            router["params"] = router["params"] + self.routes * p.owns
        yield router
        devices = p.request.devices if p.request.parallel == "expert" else 1
        tokens = p.tokens
        captured = p.lowering.engine.captured
        if p.decodes and captured is not None and captured.pads(p.batch):
            tokens += 1  # the padding repeats one token, which uses experts too
        if present(self.choices) and not p.lowering.ideal:
            yield self._select(p, tokens, devices)
        row = p.gemm("experts", part, self.inner, hidden) | {
            "kind": Kind.EXPERTS,
            "m": tokens,
            "experts": self.experts,
            "active": self.active,
            "skew": self.skew(p.request.skew or 0.0),
            "params": self.experts * self.expert_parameters(hidden) * p.owns,
        }
        yield row | ({"batch": devices} if devices > 1 else {})

    def _select(self, p: PassRows, tokens: int, devices: int) -> OperatorRow:
        """Return the kernel that changes which experts each token uses."""
        choices = np.round(np.asarray(self.choices) * devices)
        stream = p.lowering.stream_dtype
        return {
            "kind": ELEMENTWISE,
            "role": "select",
            "part": self.part,
            "m": tokens,
            "n": choices,
            "read_bytes": tokens * choices * SCORE_BYTES,
            "write_bytes": tokens * choices * SCORE_BYTES,
            "dtype": stream,
            "weight_dtype": stream,
            "overhead": True,
        }
