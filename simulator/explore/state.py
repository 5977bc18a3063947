"""The state of the page: one immutable value, and its form as the query of a URL.

Use :func:`read_query` for the query of a browser (invalid values are reported and replaced), :func:`strict_query` for a
query typed by the user, :func:`to_query` for the reverse. The same state gives the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, quote

from simulator.engines.engine import DEFAULT_ENGINE, list_engines
from simulator.errors import InputError, one_line, unknown
from simulator.explore.dropped import PREFIX, read_profile, read_token
from simulator.hardware.library import load_hardware, shipped_names
from simulator.hardware.profile import HardwareProfile
from simulator.hardware.schema import plain_name
from simulator.models.config import ModelConfig
from simulator.models.library import list_models, load_model
from simulator.predict.scenario import MAX_TOKENS, Scenario, check_fraction, once, one_of, whole_number
from simulator.pruning import FAMILIES
from simulator.units import parse_quantity
from simulator.workload import DTYPES, PHASES

MOST_SPARSITIES = 25
"""Maximum number of sparsities per curve; more would not be visible."""

MOST_NEW_TOKENS = 1024
"""Maximum number of new tokens on the page: the computing time grows with them. The commands take more."""

MOST_QUERY = 32_000
"""Maximum length of a query, characters."""

MOST_DEVICES = 1024
"""Maximum number of devices per model."""

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
    detail: str = "width"  # family of waterfall, roofline and bounds, always drawn; or EXISTING
    at: float = 0.5  # sparsity of waterfall, roofline and map, [0, 1); always a point of the curves
    dense_ms: float | None = None  # measured time of the dense model on a single GPU, ms
    versus: str = ""  # second engine, which has a waterfall too, if any

    def __post_init__(self) -> None:
        for name, values in (("gpu", self.gpus), ("family", self.families), ("sparsity", self.sparsities)):
            if not values:
                raise InputError(f"{name}: expected at least one")
        for family in self.families:
            one_of("family", family, tuple(FAMILIES))
        one_of("family", self.detail, (*FAMILIES, EXISTING))
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
        if self.dense_ms is not None and not 0.0 < self.dense_ms < 1e9:
            raise InputError(f"dense {self.dense_ms!r}: expected a positive number of milliseconds")
        _ = self.scenario, self.scenario_versus  # checks engines and dtype

    @property
    def scenario(self) -> Scenario:
        """Number formats, engine, devices and measured time."""
        known = self.dense_ms is not None and len(self.gpus) == 1
        dense_s = parse_quantity(f"{self.dense_text}ms", "s") if known else None  # as in a command
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
    def dense_text(self) -> str:
        """The measured time as the user types it, ms; empty if there is none."""
        return "" if self.dense_ms is None else repr(self.dense_ms).removesuffix(".0")

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
    def explained(self) -> str:
        """Family of waterfall, roofline and bounds, or EXISTING if there is an existing pruned model."""
        return self.detail if self.detail != EXISTING or self.pruned else self.families[0]

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


@lru_cache(maxsize=64)
def _loaded(model: str) -> ModelConfig:
    return read_token(model)[1] if model.startswith(PREFIX) else load_model(model)


# -- values of a query -------------------------------------------------------------------------------------------------


def _model(_: str, text: str) -> str:
    """Return the name of a shipped model, or a token; never a path: a page must not make the server open files."""
    if text.startswith(PREFIX):
        read_token(text)
        return text
    for name in list_models():
        if plain_name(name).replace(".", "_") == plain_name(text).replace(".", "_"):
            return name
    raise unknown("model", text, list_models())


def _gpu(text: str, own: Sequence[str] = ()) -> str:
    """Return the name of a shipped profile, a token, or one of the paths in ``own``."""
    if text in own:
        return text
    if text.startswith(PREFIX):
        read_profile(text)
        return text
    found = shipped_names().get(plain_name(text))
    if found is None:
        raise unknown("GPU", text, shipped_names(), shipped_names().values())
    return load_hardware(found).name


def _token(key: str, text: str) -> str:
    if not text.startswith(PREFIX):
        raise InputError(f"{key} {one_line(text, 40)!r}: expected the token of dropped files")
    return _model(key, text)


def _format(key: str, text: str) -> str:
    return one_of(key, text.strip(), DTYPES)


def _fraction(text: str) -> float:
    return check_fraction(_number("sparsity", text))


def _whole(key: str, text: str) -> int:
    try:
        if len(text) < 20:
            return int(text)
    except ValueError:
        pass
    raise InputError(f"{key} {text!r}: expected a whole number")


def _engine(_: str, text: str) -> str:
    """Return the name of a shipped engine, never a path."""
    return one_of("engine", text.strip(), list_engines())


def _maybe(check: Callable[[str, str], Any], absent: Any) -> Callable[[str, str], Any]:
    """Return a reader of a value that may be empty."""
    return lambda key, text: check(key, text) if text.strip() else absent


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{key} {text!r}: expected a number") from None


def _word(_: str, text: str) -> str:
    return text.strip()


def _each(check: Callable[[str], Any]) -> Callable[[str, str], Any]:
    def read(key: str, text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise InputError(f"{key}: expected at least one")
        return once(check(part) for part in parts)

    return read


# fmt: off
KEYS: Mapping[str, tuple[str, Callable[[str, str], Any]]] = MappingProxyType({
    "model": ("model", _model),
    "gpu": ("gpus", _each(_gpu)),
    "family": ("families", _each(lambda name: one_of("family", name, tuple(FAMILIES)))),
    "sparsity": ("sparsities", _each(_fraction)),
    "phase": ("phase", _word),
    "batch": ("batch", _whole),
    "seq": ("seq", _whole),
    "new": ("new_tokens", _whole),
    "engine": ("engine", _engine),
    "dtype": ("dtype", _word),
    "weights": ("weights", _maybe(_format, "")),
    "devices": ("devices", _whole),
    "pruned": ("pruned", _maybe(_token, "")),
    "detail": ("detail", _word),
    "at": ("at", lambda _, text: _fraction(text)),
    "dense": ("dense_ms", _maybe(_number, None)),
    "versus": ("versus", _maybe(_engine, "")),
})
# fmt: on
"""Keys of a query, with the field of the state and the reader of the value."""


# -- the whole query ---------------------------------------------------------------------------------------------------


def to_query(state: State) -> str:
    """Return the query of a URL, without its question mark; it contains every field.

    >>> to_query(State(gpus=("a100_sxm_80gb", "h100_sxm"), families=("depth",), sparsities=(0.25, 0.5)))[:60]
    'model=llama-3.1-8b&gpu=a100_sxm_80gb,h100_sxm&family=depth&s'
    """
    return "&".join(f"{key}={quote(_text(getattr(state, name)), safe=',~:')}" for key, (name, _) in KEYS.items())


def _text(value: Any, comma: str = ",") -> str:
    if isinstance(value, tuple):
        return comma.join(map(str, value))
    return "" if value is None else str(value)


def read_query(query: str, own: Sequence[str] = ()) -> tuple[State, tuple[str, ...]]:
    """Return the state of a query, and one line per invalid value, which its default replaces.

    The query may have its question mark. A list is separated by commas, or its key is repeated. ``own`` are paths of
    profiles that the query may name.

    >>> state, problems = read_query("?gpu=a100&batch=0")
    >>> state.gpus, problems
    (('a100_sxm_80gb',), ('batch 0: expected a whole number from 1 to 2147483647; shown with 1',))
    """
    state, problems = _read(query, own)
    return state, tuple(f"{reason}; {instead}" for reason, instead in problems)


def strict_query(query: str) -> State:
    """Return the state of a query; InputError with the first problem."""
    state, problems = _read(query)
    if problems:
        raise InputError(problems[0][0])
    return state


def _read(query: str, own: Sequence[str] = ()) -> tuple[State, list[tuple[str, str]]]:
    """Return the state, and each problem with its replacement."""
    default, state = State(), State()
    problems: list[tuple[str, str]] = []
    if len(query) > MOST_QUERY:
        return default, [(f"address: longer than {MOST_QUERY} characters", "shown with the defaults")]
    given: dict[str, list[str]] = {}
    for key, value in parse_qsl(query.removeprefix("?"), keep_blank_values=True, errors="replace"):
        given.setdefault(key, []).append(value)
    for key, texts in given.items():
        if key not in KEYS:
            problems.append((str(unknown("key", key, KEYS)), "ignored"))
            continue
        if key == "dtype" and texts[-1] in DTYPES and texts[-1] not in ARITHMETIC:
            problems.append(
                (f"dtype {texts[-1]}: is a weight format; no device computes in it", "used for the weights")
            )
            key = "weights"
        name, read = KEYS[key] if key != "gpu" else ("gpus", _each(partial(_gpu, own=own)))
        shown = getattr(state, name)
        try:
            if len(texts) > 1 and not isinstance(shown, tuple):
                raise InputError(f"{key}: given {len(texts)} times, expected once")
            value = read(key, ",".join(texts))
            replace(default, **{name: value})  # alone, so that a problem names its own value
            state = replace(state, **{name: value})
        except InputError as error:
            problems.append((one_line(str(error), 300), f"shown with {_text(shown, ', ') or 'none'}"))
    return state, problems
