"""Published pruning methods by name, as families with options and layers: :data:`METHODS`.

A new method is an entry of ``_TABLE``. An entry describes how a method changes shapes, not how it
selects weights. Widths and ranks are rounded as in the family; the code of a method can leave odd
widths, which are slower (``align=1`` of the family).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import PHASES
from simulator.display import Displayed
from simulator.errors import InputError, unknown
from simulator.pruning import FAMILIES, FamilyStep, Pruner, Target
from simulator.pruning._family import check_fraction
from simulator.workload import Workload

# function from the requested sparsity and the model to the sparsity of each family
Form = Callable[[float, Target], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, repr=False)
class Method(Displayed):
    name: str
    family: str  # key of FAMILIES, or two keys joined by "+", applied in order
    what: str  # removed parts, and their layers
    # sparsities in the paper, as the family defines them; none if a budget in tokens sets the
    # sparsity
    sparsities: tuple[float, ...] = ()
    arxiv: str  # number of the paper
    options: Mapping[str, Any] = field(default_factory=dict)  # options of its families
    layers: slice | None = field(default=None, repr=False)  # pruned layers; None: all
    # None: the same fraction everywhere; each family prunes the same share of its input
    form: Form | None = field(default=None, repr=False)
    phases: tuple[str, ...] = PHASES  # phases that it prunes

    def _title(self) -> str:
        return f"{self.name} ({self.family}): {self.what}"

    @property
    def budget(self) -> int | None:
        """Tokens that it keeps, from which its sparsity follows; None: its sparsity is an
        argument."""
        return self.options.get("budget")

    def prune(
        self, workload: Workload, sparsity: float | None = None, *, ideal: bool = False
    ) -> Workload:
        """Return the pruned workload; the sparsity is that of the whole model, None for a method
        with a budget."""
        pruner = Pruner(workload, ideal)
        for family, part, options in self.families_of(pruner.target, sparsity, workload.meta.phase):
            pruner.add(FamilyStep.of(family, part, None, options))
        return pruner.workload()

    def families_of(
        self, target: Target, sparsity: float | None, phase: str = ""
    ) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Yield the families that prune a model, with the sparsity and the options of each;
        ``phase`` is that of the request."""
        if phase and phase not in self.phases:
            raise InputError(
                f"{self.name}: expected --phase {' or '.join(self.phases)}, got {phase}"
            )
        for name, part in zip(self.family.split("+"), self._forms(sparsity, target)):
            yield name, part, {o: v for o, v in self.options.items() if o in FAMILIES[name].options}

    def _forms(self, requested: float | None, target: Target) -> tuple[Any, ...]:
        if self.budget is not None:
            if requested is not None:
                follows = f"it keeps {self.budget} tokens, so its sparsity follows from the length"
                raise InputError(f"{self.name}: {follows}; expected no sparsity, got {requested!r}")
            return (None,)
        sparsity = check_fraction(requested)
        if self.form is not None:
            return self.form(sparsity, target)
        if self.layers is None:
            many = self.family.count("+") + 1
            return (1.0 - (1.0 - sparsity) ** (1.0 / many) if many > 1 else sparsity,) * many
        of, table = target.layers, np.zeros(target.layers)
        some = len(table[self.layers])
        if sparsity * of >= some:
            expected = f"expected less than {some / of:.3g}, as it prunes {some} of {of} layers"
            raise InputError(f"{self.name} at sparsity {sparsity:g}: {expected}")
        table[self.layers] = sparsity * of / some
        return (table,)


def load_method(name: str) -> Method:
    if name not in METHODS:
        raise unknown("pruning method", name, METHODS)
    return METHODS[name]


def _hidden_and_inner(sparsity: float, target: Target) -> tuple[Any, ...]:
    """Scale hidden size and inner width by r and keep the heads: attention keeps r of its weights,
    the MLP r^2."""
    sums = {key: float(counts.sum()) for key, counts in target.weights.items()}
    attention = sum(count for (part, _), count in sums.items() if part == "attention")
    attention /= sum(sums.values())
    mlp = 1.0 - attention
    r = (math.sqrt(attention**2 + 4.0 * mlp * (1.0 - sparsity)) - attention) / (2.0 * mlp)
    return 1.0 - r, {"mlp": 1.0 - r}


def _pyramid(sparsity: float, target: Target) -> tuple[Any, ...]:
    """Use four equal stages with 1, r, r^2 and r^3 of the tokens; their mean is 1 - sparsity."""
    layers = target.layers
    if sparsity >= 0.75:
        raise InputError(
            f"pyramiddrop at sparsity {sparsity:g}: expected less than 0.75, as its first stage is"
            " dense"
        )
    return (_decay(4 * np.arange(layers) // layers, sparsity),)


def _exits(sparsity: float, target: Target) -> tuple[Any, ...]:
    """Let the same share of the remaining tokens exit after every layer; the last layer has no
    exit."""
    layers = target.layers
    if sparsity > 1.0 - 1.0 / layers:
        expected = (
            f"expected at most {1.0 - 1.0 / layers:.3g}, as every token computes the first of"
            f" {layers} layers"
        )
        raise InputError(f"calm at sparsity {sparsity:g}: {expected}")
    return (_decay(np.arange(layers), sparsity),)


def _decay(stage: Array, sparsity: float) -> Array:
    """Return sparsities per layer with the mean ``sparsity``: a layer keeps a share r^stage of its
    tokens."""
    low, high = 0.0, 1.0
    for _ in range(60):  # the mean grows with r
        r = (low + high) / 2.0
        low, high = (r, high) if np.mean(r**stage) < 1.0 - sparsity else (low, r)
    return 1.0 - r**stage


_TABLE = (
    # depth
    Method(
        name="shortgpt",
        family="depth",
        sparsities=(0.25, 0.27),
        arxiv="2403.03853",
        what="whole layers that change the hidden state least, most of them deep",
    ),
    Method(
        name="laco",
        family="depth",
        sparsities=(0.25, 0.27),
        arxiv="2402.11187",
        what="whole layers, merged into the one before them",
    ),
    Method(
        name="sleb",
        family="depth",
        sparsities=(0.1, 0.2),
        arxiv="2402.09025",
        what="whole layers, one after the other, by the perplexity without each",
    ),
    Method(
        name="shortened-llama",
        family="depth",
        sparsities=(0.2, 0.35),
        arxiv="2402.02834",
        what="whole layers, all at once, then retraining",
    ),
    Method(
        name="minitron-depth",
        family="depth",
        sparsities=(0.5,),
        arxiv="2408.11796",
        what="a run of whole layers before the last, then distillation",
    ),
    Method(
        name="attention-drop",
        family="depth",
        options={"unit": "attention"},
        sparsities=(0.25, 0.5),
        arxiv="2406.15786",
        what="attention sublayers, with their cache; every MLP stays",
    ),
    Method(
        name="layerskip",
        family="depth",
        options={"early_exit": True},
        sparsities=(0.5,),
        arxiv="2404.16710",
        what="the last layers: all tokens exit at layer E and go to the head (no self-speculation)",
    ),
    # width
    Method(
        name="llm-pruner",
        family="width",
        layers=slice(4, -2),
        sparsities=(0.2, 0.5),
        arxiv="2305.11627",
        what="heads and MLP channels; the first four and the last two layers stay",
    ),
    Method(
        name="flap",
        family="width",
        sparsities=(0.2, 0.3, 0.5),
        arxiv="2312.11983",
        what="heads and MLP channels; here the same share of every layer",
    ),
    Method(
        name="slicegpt",
        family="width_cross",
        options={"residual_projections": True, "align": 8},
        sparsities=(0.2, 0.25, 0.3),
        arxiv="2401.15024",
        what="hidden size; two residual projections per layer are added",
    ),
    Method(
        name="minitron-width",
        family="width_cross+width",
        form=_hidden_and_inner,
        sparsities=(0.5,),
        arxiv="2408.11796",
        what="hidden size and inner width by one share; heads and layers stay",
    ),
    Method(
        name="sheared-llama",
        family="width_cross+width",
        sparsities=(0.6, 0.8),
        arxiv="2310.06694",
        what="hidden size, heads and inner width by one share (not its 1.3B's layers)",
    ),
    # zeros and factors
    Method(
        name="wanda",
        family="unstructured",
        sparsities=(0.5,),
        arxiv="2306.11695",
        what="single weights of every projection, by magnitude times activation",
    ),
    Method(
        name="sparsegpt",
        family="unstructured",
        sparsities=(0.5,),
        arxiv="2301.00774",
        what="single weights of every projection, by a layer-wise reconstruction",
    ),
    Method(
        name="wanda-2:4",
        family="semi_structured",
        sparsities=(0.5,),
        arxiv="2306.11695",
        what="two of four neighbouring weights of every projection",
    ),
    Method(
        name="sparsegpt-2:4",
        family="semi_structured",
        sparsities=(0.5,),
        arxiv="2301.00774",
        what="two of four neighbouring weights of every projection",
    ),
    Method(
        name="mask-llm",
        family="semi_structured",
        sparsities=(0.5,),
        arxiv="2409.17481",
        what="two of four neighbouring weights of every projection, by a learned mask",
    ),
    Method(
        name="svd-llm",
        family="low_rank",
        sparsities=(0.2, 0.4, 0.6, 0.8),
        arxiv="2403.07378",
        what="every projection becomes two thin factors, of whitened weights",
    ),
    Method(
        name="asvd",
        family="low_rank",
        sparsities=(0.1, 0.2, 0.3),
        arxiv="2312.05821",
        what="every projection becomes two thin factors; here the same share of each",
    ),
    # dynamic depth and width
    Method(
        name="skipgpt",
        family="dynamic_depth",
        sparsities=(0.25, 0.4),
        arxiv="2506.04179",
        what="tokens skip attention and MLP, each by its own router; k and v stay",
    ),
    Method(
        name="mod",
        family="dynamic_depth",
        options={"prune_kv": True, "router": 1},
        layers=slice(1, None, 2),
        sparsities=(0.4375,),
        arxiv="2404.02258",
        what="tokens skip every other layer, with keys and values; 0.4375: 12.5 % stay",
    ),
    Method(
        name="calm",
        family="dynamic_depth",
        options={"unit": "layer", "router": 1, "kernel": "gathered"},
        form=_exits,
        phases=("decode",),
        sparsities=(0.67,),
        arxiv="2207.07061",
        what=(
            "tokens exit by a classifier after each layer, each alone in a batch; 0.67: a third of"
            " the layers on average; k and v of skipped layers are computed"
        ),
    ),
    Method(
        name="deja-vu",
        family="dynamic_width",
        sparsities=(0.75,),
        arxiv="2310.17157",
        what="heads and MLP channels of every layer, chosen for each token",
    ),
    # attention, tokens, cache
    Method(
        name="seer-attention",
        family="sparse_attention",
        options={"block": 64},
        phases=("prefill",),
        sparsities=(0.9,),
        arxiv="2410.13276",
        what="blocks of 64 x 64 query-key pairs, by a learned gate",
    ),
    Method(
        name="seer-attention-r",
        family="sparse_attention",
        options={"block": 64},
        phases=("decode",),
        sparsities=(0.9,),
        arxiv="2506.08889",
        what="blocks of 64 cached positions, by a learned gate",
    ),
    Method(
        name="minference",
        family="sparse_attention",
        options={"block": 64},
        phases=("prefill",),
        sparsities=(0.95,),
        arxiv="2407.02490",
        what="blocks of 64 x 64 query-key pairs, by a pattern of each head",
    ),
    Method(
        name="minference-7096",
        family="sparse_attention",
        options={"block": 64, "budget": 7096},
        phases=("prefill",),
        arxiv="2407.02490",
        what="all but 7,096 keys per query, in 1,000 vertical and 6,096 slash lines of each head",
    ),
    Method(
        name="quest",
        family="sparse_attention",
        options={"block": 16},
        phases=("decode",),
        layers=slice(2, None),
        sparsities=(0.82, 0.88),
        arxiv="2406.10774",
        what="pages of 16 cached positions, except in two layers; 0.82: 4k of 32k stay",
    ),
    Method(
        name="fastv",
        family="token",
        options={"start": 2},
        sparsities=(0.5, 0.75),
        arxiv="2403.06764",
        what="tokens (of images) from the third layer on, by their attention",
    ),
    Method(
        name="pyramiddrop",
        family="token",
        form=_pyramid,
        sparsities=(0.53125,),
        arxiv="2410.17247",
        what="tokens (of images) after each quarter of the layers; at 0.53125 half",
    ),
    Method(
        name="llmlingua",
        family="token",
        options={"start": 0, "mode": "static"},
        sparsities=(0.5, 0.8, 0.95),
        arxiv="2310.05736",
        what="tokens of the prompt, by a small model before it (not timed here)",
    ),
    Method(
        name="snapkv",
        family="kv_cache",
        options={"observed": 32},
        sparsities=(0.68, 0.92),
        arxiv="2404.14469",
        what="cached positions of the prompt, by the attention of its last 32",
    ),
    Method(
        name="h2o",
        family="kv_cache",
        options={"observed": 10**6},
        sparsities=(0.8,),
        arxiv="2306.14048",
        what="cached positions of the prompt, by the attention of all queries, written out",
    ),
    *(
        Method(
            name=f"snapkv-{budget}",
            family="kv_cache",
            options={"observed": 32, "budget": budget},
            arxiv="2404.14469",
            what=(
                f"all but {budget:,} cached positions of the prompt, by the attention of its"
                " last 32"
            ),
        )
        for budget in (1024, 2048, 4096)
    ),
    Method(
        name="streaming-llm",
        family="kv_cache",
        options={"observed": 0, "budget": 2048, "rolling": True},
        arxiv="2309.17453",
        what=(
            "cached positions, of the prompt or new, except the first 4 and the last 2,044; the"
            " prefill stays dense"
        ),
    ),
    # experts
    Method(
        name="reap",
        family="experts",
        sparsities=(0.25, 0.5),
        arxiv="2510.13999",
        what="experts with their router outputs, by gate value times output norm",
    ),
    Method(
        name="naee",
        family="experts",
        sparsities=(0.25, 0.5),
        arxiv="2402.14800",
        what="experts with their router outputs, by the error of each layer's output",
    ),
    Method(
        name="naee-skip",
        family="experts",
        options={"fewer": "average"},
        sparsities=(0.25,),
        arxiv="2402.14800",
        what=(
            "the second expert of half of the tokens, where its gate value is small; all weights"
            " stay"
        ),
    ),
    Method(
        name="hc-smoe",
        family="experts",
        options={"merged": True},
        sparsities=(0.25, 0.5),
        arxiv="2410.08589",
        what="experts, merged by clusters of their outputs; the router keeps its outputs",
    ),
    Method(
        name="m-smoe",
        family="experts",
        options={"merged": True},
        sparsities=(0.75,),
        arxiv="2310.01334",
        what=(
            "experts, merged by their routing into about 8 of 32 per layer; the router keeps its"
            " outputs"
        ),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({entry.name: entry for entry in _TABLE})
