"""Routed experts, with the experts that all tokens share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.codes import Kind, Part
from simulator.models.form import present
from simulator.models.pass_rows import (
    OperatorRow,
    OperatorRows,
    PassRows,
    Products,
    Shapes,
    elements,
)
from simulator.models.sublayers.base import BySize, Cut, SharedSize, Sublayer
from simulator.models.sublayers.mlp import Mlp

SCORE_BYTES = 4.0  # bytes of a score or an index: fp32 or int32


@dataclass(frozen=True, kw_only=True)
class Experts(Sublayer):
    """A router and its experts; a token uses some of them."""

    PART = Part.MLP
    SIZES = (
        "experts",
        "active",
        "inner",
        "outputs_of_router",
        "trained",
        "choices",
        "shared_inner",
        "latent",
        "zero_experts",
        "router_inner",
    )
    LABEL = "experts"
    WHOLE = ("experts", "latent_in", "latent_out")

    experts: int
    active: float  # experts that a token uses; on one of several devices, on average
    inner: int  # inner width of an expert
    gated: bool = True  # experts and shared MLP have a gate projection
    latent: int = 0  # features of the projection that experts read and write; 0: the hidden size
    shared_inner: int = 0  # inner width of the MLP that all tokens use; 0: none
    shared_parts: int = 1  # MLPs of equal width that it consists of
    shared_bias: bool = False  # biases of all projections of that MLP, and to and from the latent
    shared_gate: bool = False  # a scalar weighs that MLP
    # norms of the shared MLP's output, of the router's input, and of the input and output of the
    # experts (Gemma 4)
    branch_norms: bool = False
    router_bias: bool = False  # an addend or a factor of every output
    # inner width of a router of a product, a norm, two products and the last product, with biases
    # except of the last (ZAYA); 0: a router is one product
    router_inner: int = 0
    router_carry: bool = False  # such a router adds the scaled inner features of the layer before
    zero_experts: int = 0  # experts without work that the router can choose too
    bias: bool = False  # bias of the experts
    output_bias: bool = False  # bias of the sum of the experts
    outputs_of_router: int = 0  # outputs of a router whose choices a table maps to merged experts
    trained: float = 0  # experts of the model before pruning, which determine the skew; 0: the same
    # choices of the router per token that a kernel maps to experts (merging, a number per token);
    # 0: a token uses its choices
    choices: float = 0.0

    @property
    def shape(self) -> str:
        shared = f", beside an MLP of {self.shared_inner:,}" if self.shared_inner else ""
        count = f"{self.experts} of a width of {self.inner:,}, {self.active:g} per token"
        return f"{count}{shared}"

    @property
    def shared(self) -> Mlp | None:
        """The MLP that all tokens use."""
        if not present(self.shared_inner):
            return None
        return Mlp(
            inner=self.shared_inner, gated=self.gated, bias=self.shared_bias, forms=self.forms
        )

    @property
    def routes(self) -> int:
        """Outputs of the router."""
        known = present(self.outputs_of_router)
        return self.outputs_of_router if known else self.experts + self.zero_experts

    def features(self, hidden: int) -> int:
        """Return the features that experts read and write."""
        return self.latent if present(self.latent) else hidden

    def expert_parameters(self, hidden: int) -> int:
        """Return the parameters of one routed expert."""
        features = self.features(hidden)
        inputs = (1 + self.gated) * self.inner
        return features * (inputs + self.inner) + self.bias * (inputs + features)

    def weights(self, hidden: int) -> Shapes:
        shared = self.shared.weights(hidden) if self.shared is not None else {}
        experts = {"experts": (self.experts * self.expert_parameters(hidden), 1)}
        return {**shared, **self._latents(hidden), **experts}

    def _latents(self, hidden: int) -> Shapes:
        if not present(self.latent):
            return {}
        return {"latent_in": (self.latent, hidden), "latent_out": (hidden, self.latent)}

    def _routers(self, hidden: int) -> Products:
        """Return outputs and inputs of the products of the router, and how many there are."""
        inner = self.router_inner
        if not present(inner):
            return {"router": (self.routes, hidden, 1)}
        first = {"router_in": (inner, hidden, 1), "router_inner": (inner, inner, 2)}
        return {**first, "router": (self.routes, inner, 1)}

    def products(self, hidden: int) -> Products:
        shared = self._shared_products(hidden)
        features = self.features(hidden)
        roles = ("gate", "up") if self.gated else ("up",)
        inputs = {f"expert_{role}": (self.inner, features, self.experts) for role in roles}
        outputs = {"expert_down": (features, self.inner, self.experts)}
        gate = {"shared_gate": (1, hidden, 1)} if shared and self.shared_gate else {}
        latents = {role: (n, k, 1) for role, (n, k) in self._latents(hidden).items()}
        return {**shared, **gate, **self._routers(hidden), **latents, **inputs, **outputs}

    def _shared_products(self, hidden: int) -> Products:
        if self.shared is None:
            return {}
        parts = self.shared_parts
        each = replace(self.shared, inner=self.shared_inner // parts)
        return {role: (n, k, parts) for role, (n, k, _) in each.products(hidden).items()}

    def parameters(self, hidden: int) -> int:
        router = elements(self._routers(hidden))
        # biases of three products and a norm
        router += (4 + self.router_carry) * self.router_inner + self.router_bias * self.routes
        latents = sum(n * k + self.shared_bias * n for n, k in self._latents(hidden).values())
        others = (4 * self.branch_norms + self.output_bias) * hidden
        routed = self.experts * self.expert_parameters(hidden)
        total = router + routed + latents + others
        if self.shared is None:
            return total
        return total + self.shared.parameters(hidden) + self.shared_gate * hidden

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

    def sizes(self) -> BySize:
        shared = {"inner width": self.shared_inner} if self.shared_inner else {}
        latent = {"latent features": self.latent} if self.latent else {}
        counts = {"experts": self.experts, "active experts": self.active}
        return {**shared, **latent, **counts, "expert width": self.inner}

    def narrower(self, cut: Cut) -> Experts:
        shared = cut.width(self.shared_inner, cut.inner)
        return replace(self, inner=cut.width(self.inner), shared_inner=shared)

    def rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        hidden = p.hidden
        shared = self.shared
        if shared is not None:
            yield from shared.rows(p)
            if self.shared_gate:
                yield p.wide_gemm("shared_gate", part, 1, hidden)
        if self.branch_norms:
            yield p.norm_after(part, adds=False)
            for _ in ("router", "experts"):
                yield p.norm_before("mlp_norm", part, adds=False)
        yield from self._router_rows(p)
        devices = p.request.devices if p.request.parallel == "expert" else 1
        tokens = p.tokens
        captured = p.lowering.engine.captured
        if p.decodes and captured is not None and captured.pads(p.batch):
            tokens += 1  # the padding repeats one token, which uses experts too
        if present(self.choices) and not p.lowering.ideal:
            yield self._select(p, tokens, devices)
        owned = self.experts * self.expert_parameters(hidden) + self.output_bias * hidden
        row = p.gemm("experts", part, self.inner, self.features(hidden)) | {
            "kind": Kind.EXPERTS,
            "m": tokens,
            "experts": self.experts,
            "active": self.active,
            "skew": self.skew(p.request.skew or 0.0),
            "params": owned * p.owns,
            "gated": self.gated,
        }
        if present(self.latent):
            yield from p.weight(self, "latent_in", self.shared_bias)
        yield row | ({"batch": devices} if devices > 1 else {})
        if present(self.latent):
            yield from p.weight(self, "latent_out", self.shared_bias)
        if self.branch_norms:
            yield p.norm_after(part, adds=False)
            yield p.move("residual", part, hidden, 2 * hidden)

    def _router_rows(self, p: PassRows) -> OperatorRows:
        part = self.part
        inner = self.router_inner
        for role, (n, k, many) in self._routers(p.hidden).items():
            row = p.wide_gemm("router", part, n, k)
            bias = self.router_bias if role == "router" else True
            for _ in range(many):
                yield row | {"params": row["params"] + bias * n * p.owns}
            if role == "router_in":
                owned = (1 + self.router_carry) * inner
                yield p.move("mlp_norm", part, inner, params=owned)

    def _select(self, p: PassRows, tokens: int, devices: int) -> OperatorRow:
        """Return the kernel that changes which experts each token uses."""
        choices = np.round(np.asarray(self.choices) * devices)
        moved = tokens * choices * SCORE_BYTES
        bytes_moved = {"read_bytes": moved, "write_bytes": moved}
        row = p.kernel(Kind.ELEMENTWISE, "select", self.part, m=tokens, n=choices, **bytes_moved)
        return row | {"overhead": True}
