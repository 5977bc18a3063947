"""Define what every kind of sublayer knows: :class:`Sublayer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from simulator.codes import Part
from simulator.models.form import PLAIN, Form
from simulator.models.pass_rows import OperatorRows, PassRows, Products, Shapes
from simulator.models.sublayers.entry import Entry

S = TypeVar("S", bound="Sublayer")

BySize = Mapping[str, float]
"""A number for each of some sizes, such as "KV heads"."""


@dataclass(frozen=True)
class Cut:
    """Parts of sublayers that width pruning removes."""

    # share of each part: "attention" (KV heads with their query heads), "heads", "kv", "mlp",
    # "mamba_heads", "mamba_channels" and "mamba_state"
    shares: BySize
    align: int  # inner widths are multiples of it
    inner: int | None = None  # inner width of MLPs, instead of their share

    def kept(self, part: str, size: int) -> int:
        """Return how many remain of a size that is divided into parts."""
        return remaining(size, self.shares[part])

    def width(self, size: int, stated: int | None = None) -> int:
        """Return the width that remains of an inner width: the ``stated`` one, if any."""
        share = self.shares["mlp"]
        if stated and share and size:
            return stated
        return aligned(size, share, self.align)


class SharedSize(NamedTuple):
    """A size that devices divide among them."""

    words: str  # text with the size, such as "{} attention heads"
    size: int
    prune: str  # text of --prune with the size that remains
    copies: bool = False  # devices beyond this number hold copies

    def fits(self, devices: int, size: int | None = None) -> bool:
        size = self.size if size is None else size
        return size % devices == 0 or (self.copies and size > 0 and devices % size == 0)

    def reason(self, devices: int, parallel: str) -> str:
        """Return why ``devices`` cannot divide the size equally."""
        needs = "a multiple or a divisor" if self.copies else "a multiple"
        return f"{self.words.format(self.size)}; {parallel} parallel needs {needs} of {devices}"

    def nearest(self, devices: int) -> str:
        """Return the nearest sizes that ``devices`` can divide, and a text of --prune."""
        lower = next((n for n in range(self.size, 0, -1) if self.fits(devices, n)), 0)
        higher = -(-self.size // devices) * devices
        if not lower:
            return f"the nearest size is {higher:,}"
        sizes = f"{lower:,} and {higher:,}"
        return f"the nearest sizes are {sizes}: {self.prune.format(lower)}"


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """A part of a layer that reads the residual stream and adds to it.

    A kind of sublayer is one file of this package with one class. It knows its sizes, parameters,
    share on one of several devices, and operators.
    """

    PART: ClassVar[Part] = Part.ATTENTION
    # sizes that can differ between layers of one structure; pruning changes some of them
    SIZES: ClassVar[tuple[str, ...]] = ()
    # sizes that devices divide among them, each with the texts of its SharedSize
    DIVIDED: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    COPIED: ClassVar[tuple[str, ...]] = ()  # weights of which further devices hold copies
    # sizes that pruning changes: name, such as "KV heads", and field or property
    NAMED: ClassVar[tuple[tuple[str, str], ...]] = ()
    # whether its weights have kernels for zeros and factors, see `simulator.pruning.Family.whole`
    WHOLE: ClassVar[tuple[str, ...]] = ()
    KIND: ClassVar[str] = ""  # its name in the family depth; "": that of its part
    SHAPE: ClassVar[str] = ""  # text with the sizes, which are fields or properties of "{0}"
    LABEL: ClassVar[str] = ""  # name of the kind; "": a small addition to other sublayers
    # whether devices that share a layer add their parts of its output; else each computes it whole
    REDUCES: ClassVar[bool] = True

    forms: tuple[tuple[str, Form], ...] = ()  # weights that are not stored plainly, by role
    rotates: bool = False  # a product rotates its residual (SliceGPT)
    joins: bool = False  # reads the normed input of the sublayer before it, and has no own norm
    scales: bool = False  # a learned vector scales the residual stream before it is added (Doge)
    reused: bool = False  # an earlier layer holds its weights, and norms before and after it
    # whether norms of the residual stream precede and follow it; None: as in the whole model
    norms: tuple[bool, bool] | None = None
    entry: Entry | None = None  # how it reads the residual stream, besides a norm

    @property
    def part(self) -> Part:
        return self.PART

    @property
    def kind(self) -> str:
        """The name of the sublayer in the family depth."""
        return self.KIND or ("mlp" if self.part == Part.MLP else "attention")

    @property
    def label(self) -> str:
        return self.LABEL

    @property
    def shape(self) -> str:
        """The sizes in words."""
        return self.SHAPE.format(self)

    def weights(self, hidden: int) -> Shapes:
        """Return outputs and inputs of the weights that pruning counts, by role."""
        return {}

    def products(self, hidden: int) -> Products:
        """Return outputs and inputs of all linear products, and how many there are, by role.
        Low-rank factors are excluded."""
        return {role: (n, k, 1) for role, (n, k) in self.weights(hidden).items()}

    def parameters(self, hidden: int) -> int:
        """Return the parameters, without norms of the residual stream and residual projections."""
        return self.stored(hidden) + self.other_parameters(hidden)

    def other_parameters(self, hidden: int) -> int:
        """Return the parameters besides those of the weights that pruning counts."""
        return 0

    def stored_outside(self, hidden: int) -> int:
        """Return how many of the parameters a checkpoint stores outside the layer."""
        return 0

    def outputs(self, hidden: int) -> int:
        """Return the features that the sublayer writes."""
        return hidden

    def shared_sizes(self, parallel: str) -> tuple[SharedSize, ...]:
        """Return the sizes that tensor or expert parallel divides among devices."""
        return tuple(
            SharedSize(words, getattr(self, name), prune, name in self.COPIED)
            for name, words, prune in self.DIVIDED
        )

    def share(self: S, devices: int, parallel: str) -> S:
        """Return the part of the sublayer that each of several devices computes."""
        parts: dict[str, Any] = {
            name: max(getattr(self, name) // devices, int(name in self.COPIED))
            for name, *_ in self.DIVIDED
        }
        return replace(self, **parts)

    def sizes(self) -> BySize:
        return {name: getattr(self, field) for name, field in self.NAMED}

    def narrower(self: S, cut: Cut) -> S:
        """Return the sublayer without shares of its parts."""
        return self

    def rows(self, p: PassRows) -> OperatorRows:
        """Yield the operators of the sublayer, without norms and collectives: its weights."""
        for role, shape in self.weights(p.hidden).items():
            yield p.gemm(role, self.part, *shape)

    def form(self, role: str) -> Form:
        return dict(self.forms).get(role, PLAIN)

    def stores(self, role: str) -> bool:
        """Return whether a checkpoint has factors of several weights together (``qkv``)."""
        return any(name == role for name, _ in self.forms)

    def with_forms(self: S, forms: Mapping[str, Form]) -> S:
        """Return the sublayer with other forms of some weights."""
        known = {**dict(self.forms), **forms}
        return replace(self, forms=tuple((r, f) for r, f in known.items() if f != PLAIN))

    def weight_counts(self, hidden: int) -> dict[str, Any]:
        """Return the number of values that are not zero by role, without biases."""
        return {
            role: self.form(role).nonzero(*shape) for role, shape in self.weights(hidden).items()
        }

    def stored(self, hidden: int) -> int:
        """Return the number of values of all weights in a checkpoint, zeros included."""
        weights = self.weights(hidden).items()
        return sum(self.form(role).weights(n, k) for role, (n, k) in weights)

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """Key of sublayers that make the same rows, whose sizes alone differ."""
        sizes = tuple(bool(getattr(self, name)) for name in self.SIZES)
        kind: Any = type(self)
        others = tuple(getattr(self, name) for name in _settings(kind))
        known = [form for _, form in self.forms]
        forms = tuple(
            (role, form.rank is None, form.zeros, known.index(form)) for role, form in self.forms
        )
        return kind, sizes, others, forms


@cache
def _settings(kind: Any) -> tuple[str, ...]:
    """Return the fields that tell apart the rows of sublayers of equal sizes."""
    apart = {*kind.SIZES, "forms", "window"}
    return tuple(field.name for field in fields(kind) if field.name not in apart)


def remaining(size: int, share: float) -> int:
    """Return a size without a share of it, rounded to the nearest whole number, at least one."""
    return max(math.floor((1.0 - share) * size + 0.5), 1) if share > 0 else size


def aligned(size: int, share: float, align: int) -> int:
    """Return a size without a share of it, rounded up to a multiple of ``align``, at most the
    size."""
    if share <= 0:
        return size
    wanted = math.ceil((1.0 - share) * size / align - 1e-9) * align
    return min(max(wanted, align), size)


def stacked(sublayers: Sequence[Sublayer]) -> Sublayer:
    """Return one sublayer of the structure of several, with arrays of their sizes."""
    first = sublayers[0]
    if all(sublayer is first or sublayer == first for sublayer in sublayers):
        return first
    sizes: dict[str, Any] = {
        name: np.array([getattr(sublayer, name) for sublayer in sublayers]) for name in first.SIZES
    }
    forms = tuple(
        (role, _stacked_form([sublayer.form(role) for sublayer in sublayers]))
        for role, _ in first.forms
    )
    out = replace(first, forms=forms, **sizes)
    vars(out)["structure"] = first.structure  # arrays have none of their own
    return out


def _stacked_form(forms: Sequence[Form]) -> Form:
    first = forms[0]
    rank = None if first.rank is None else np.array([form.rank for form in forms])
    return Form(rank, first.zeros, np.array([form.density for form in forms]))
