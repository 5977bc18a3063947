"""The state of the page: one immutable value. The same state gives the same page.

:mod:`simulator.explore.address` has its form as the query of a URL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from simulator.arguments import number
from simulator.engines.engine import DEFAULT_ENGINE
from simulator.errors import InputError
from simulator.explore.dropped import PREFIX, read_profile, read_token
from simulator.figures.paper import BATCHES, LENGTHS
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.prediction.operating import PRICE
from simulator.prediction.prunings import Pruning
from simulator.prediction.scenario import MAX_TOKENS, Scenario, check_fraction, once, one_of, whole_number
from simulator.pruning import FAMILIES
from simulator.pruning._grammar import is_plan
from simulator.units import parse_quantity
from simulator.workload import DTYPES, PHASES

MOST_SPARSITIES = 25
"""Maximum number of sparsities per curve; more would not be visible."""

MOST_NEW_TOKENS = 1024
"""Maximum number of new tokens on the page: the computing time grows with them. The commands take more."""

MOST_DEVICES = 1024
"""Maximum number of devices per model."""

MOST_PRUNINGS = 8
"""Maximum number of texts of ``--prune``; more curves could not be told apart."""

MOST_PASSES, MOST_MAP_PASSES = 400_000, 250_000
"""Maximum number of passes that the page computes at once, about a second, and of those of its map, about two. The
commands and the report have no such limit."""

_PREDICTION, _EXPLANATION = 40, 4_000
"""Work on a prediction and on an explanation besides their passes, in passes."""

_LISTED = 7
"""Additional kinds of layers of a pruning that lists layers, about."""

AXES: Mapping[str, tuple[int, ...]] = MappingProxyType({"batch": BATCHES, "seq": LENGTHS})
"""Axes of the second figure of speedups and their values."""

EXISTING = "pruned"
"""Name of the existing pruned model where a family is expected."""

ARITHMETIC = tuple(dtype for dtype in DTYPES if dtype not in ("int4", "fp8_block", "mxfp4"))
"""Number formats of arithmetic; the other formats are for weights only."""

_IN_FP8 = ("fp8_block", "nvfp4")
"""Weight formats that no engine combines with 16-bit activations: the arithmetic is fp8."""


@dataclass(frozen=True)
class State:
    """All settings of the page.

    >>> State(families=("width",), detail="depth").drawn
    ('depth', 'width')
    """

    model: str = "llama-3.1-8b"  # a name, a path (report only), or the token of dropped files
    gpus: tuple[str, ...] = ("h100_sxm",)  # names of profiles, paths given to the command, or tokens
    families: tuple[str, ...] = ("depth", "width", "low_rank", "dynamic_depth")  # with a curve
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # points of the curves, [0, 1)
    phase: str = "prefill"
    batch: int = 1  # sequences
    seq: int = 2048  # tokens per sequence
    new_tokens: int = 128  # decoded per sequence by a generate or a serve
    engine: str = DEFAULT_ENGINE  # a name, or a path (report only)
    dtype: str = "bf16"
    weights: str = ""  # format of stored weights; "": the checkpoint's, else the format of arithmetic
    devices: int = 1  # tensor parallel
    pruned: str = ""  # an existing pruned model: a path (report only), or a token
    prune: tuple[str, ...] = ()  # texts of --prune, or paths of plans (report only)
    detail: str = "width"  # waterfall, roofline and bounds: a family or a text of --prune, always drawn; or EXISTING
    at: float = 0.5  # sparsity of waterfall, roofline and map, [0, 1); always a point of the curves
    over: str = "batch"  # axis of the second figure of speedups
    dense_ms: float | None = None  # measured time of the dense model on a single GPU, ms
    ttft_ms: float | None = None  # limit of the time to the first token of a serve, ms
    tpot_ms: float | None = None  # limit of its time per output token, ms
    price: float | None = None  # of a GPU-hour of a serve
    versus: str = ""  # second engine, which has a waterfall too, if any
    pin: State | None = None  # a state that is compared with this one

    def __post_init__(self) -> None:
        object.__setattr__(self, "prune", once(map(normal, self.prune)))
        if self.detail not in (*FAMILIES, EXISTING):
            object.__setattr__(self, "detail", normal(self.detail))
        for name, values in (("gpu", self.gpus), ("family", self.families), ("sparsity", self.sparsities)):
            if not values:
                raise InputError(f"{name}: expected at least one")
        for family in self.families:
            one_of("family", family, tuple(FAMILIES))
        if len(self.prune) > MOST_PRUNINGS:
            raise InputError(f"prune: expected at most {MOST_PRUNINGS} of them, got {len(self.prune)}")
        one_of("axis", self.over, tuple(AXES))
        if self.pin is not None and self.pin.pin is not None:
            raise InputError("pin: expected a setting without a pin")
        labels = [profile.label for profile in self.profiles]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise InputError(f"gpu: two profiles are called {twice[0]}; expected one of them")
        for fraction in (*self.sparsities, self.at):
            check_fraction(fraction)
        if len(self.sparsities) > MOST_SPARSITIES:
            raise InputError(f"sparsity: expected at most {MOST_SPARSITIES} of them, got {len(self.sparsities)}")
        one_of("phase", self.phase, PHASES)
        whole_number("batch", self.batch)
        whole_number("seq", self.seq)
        whole_number("new", self.new_tokens, MOST_NEW_TOKENS)
        whole_number("devices", self.devices, MOST_DEVICES)
        if self.weights:
            one_of("weights", self.weights, DTYPES)
        if self.batch * self.seq > MAX_TOKENS and self.phase != "decode":
            raise InputError(f"batch {self.batch} x seq {self.seq}: expected at most {MAX_TOKENS} tokens in a pass")
        for name, given in (("dense", self.dense_ms), ("ttft", self.ttft_ms), ("tpot", self.tpot_ms)):
            if given is not None and not 0.0 < given < 1e9:
                raise InputError(f"{name} {given!r}: expected a positive number of milliseconds")
        if self.price is not None:
            number("price", self.price, PRICE)
        _ = self.scenario, self.scenario_versus  # checks engines and dtype

    @property
    def scenario(self) -> Scenario:
        """Number formats, engine, devices and measured time."""
        known = self.dense_ms is not None and len(self.gpus) == 1
        dense_s = seconds_of(self.dense_ms) if known else None
        return Scenario(
            new_tokens=self.new_tokens,
            engine=self.engine,
            dtype=self.arithmetic,
            weight_dtype=self.weights or None,
            devices=self.devices,
            dense_s=dense_s,
        )

    @property
    def arithmetic(self) -> str:
        """Number format of arithmetic: the requested one, or fp8 if the weight format requires it."""
        stored = self.weights or self.load().weight_dtype
        return "fp8" if stored in _IN_FP8 and self.dtype in ("bf16", "fp16") else self.dtype

    @property
    def scenario_versus(self) -> Scenario | None:
        """The scenario in the second engine, without the measured time; None if there is no second engine."""
        if self.versus in ("", self.engine):
            return None
        return replace(self.scenario, engine=self.versus, dense_s=None)

    @property
    def drawn(self) -> tuple[str, ...]:
        """Families with a curve, in the order of tables."""
        return tuple(name for name in FAMILIES if name in self.families or name == self.detail)

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of ``--prune`` that are drawn."""
        return once((*self.prune, *([] if self.detail in (*FAMILIES, EXISTING) else [self.detail])))

    @property
    def explained(self) -> str:
        """Family or text of waterfall, roofline and bounds, or EXISTING if there is an existing pruned model."""
        return self.detail if self.detail != EXISTING or self.pruned else self.families[0]

    def shapes(self, over: str) -> tuple[tuple[int, int], ...]:
        """Return batches and lengths along an axis, at the state's value of the other one."""
        shapes = [(v, self.seq) if over == "batch" else (self.batch, v) for v in AXES[over]]
        return tuple((b, s) for b, s in shapes if b * s <= MAX_TOKENS or self.phase == "decode")

    @property
    def passes(self) -> int:
        """Work on the table, the curves and the explanations, in passes of one kind of layer, about.

        >>> State().passes < 10_000, State(phase="generate", new_tokens=1000).passes > 50_000
        (True, True)
        """
        steps = self._steps
        family = _PREDICTION + steps
        texts = sum(_PREDICTION + steps * (1 + _LISTED * text.count("layers=")) for text in self.texts)
        existing = _PREDICTION + steps * _kinds(self.pruned) if self.pruned else 0
        curves = sum(len(self.shapes(over)) for over in {self.over, "batch"})
        table = len(self.drawn) * len(self.fractions) * family + texts + existing
        explained = _EXPLANATION * (2 if self.versus else 1)
        return len(self.gpus) * (table + curves * (len(self.drawn) * family + texts + existing) + explained)

    @property
    def map_passes(self) -> int:
        """Work on the map, in passes of one kind of layer, about."""
        return len(self.gpus) * len(self.drawn) * len(BATCHES) * len(LENGTHS) * (8 + self._steps)

    @property
    def _steps(self) -> int:
        return _kinds(self.model) * (self.new_tokens if self.phase == "generate" else 1)

    @property
    def profiles(self) -> tuple[HardwareProfile, ...]:
        """Profiles of the GPUs."""
        return tuple(read_profile(gpu)[1] if gpu.startswith(PREFIX) else load_hardware(gpu) for gpu in self.gpus)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Sparsities of the curves, ascending."""
        return tuple(sorted({*self.sparsities, self.at}))

    def load(self) -> ModelConfig:
        """Load the model."""
        return _loaded(self.model)

    def load_pruned(self) -> ModelConfig | None:
        """Load the existing pruned model, if there is one."""
        return _loaded(self.pruned) if self.pruned else None


def typed(number: float | None) -> str:
    """Return a number as the user types it; "" for None.

    >>> typed(500.0), typed(18.6), typed(None)
    ('500', '18.6', '')
    """
    return "" if number is None else repr(number).removesuffix(".0")


def seconds_of(ms: float | None) -> float | None:
    """Return a time in ms as the command line reads it, s."""
    return None if ms is None else parse_quantity(f"{typed(ms)}ms", "s")


def normal(text: str) -> str:
    """Return a text of ``--prune`` as the parser writes it."""
    return Pruning.read(text).text if is_plan(text) else _read_once(text)


@lru_cache(maxsize=256)
def _read_once(text: str) -> str:
    return Pruning.read(text).text


@lru_cache(maxsize=64)
def _loaded(model: str) -> ModelConfig:
    return read_token(model)[1] if model.startswith(PREFIX) else load_model(model)


@lru_cache(maxsize=64)
def _kinds(model: str) -> int:
    """Return the number of different layers of a model."""
    return len(set(_loaded(model).layout))
