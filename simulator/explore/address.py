"""The state of the page as the query of a URL.

Use :func:`read_query` for the query of a browser (invalid values are reported and replaced), :func:`strict_query` for a
query typed by the user, :func:`to_query` for the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, quote

from simulator.engines.engine import list_engines
from simulator.errors import InputError, one_line, unknown
from simulator.explore.dropped import PREFIX, read_profile, read_token
from simulator.explore.state import ARITHMETIC, EXISTING, MOST_PASSES, MOST_PRUNINGS, State, normal
from simulator.hardware.library import load_hardware, shipped_names
from simulator.hardware.schema import plain_name
from simulator.models.library import list_models
from simulator.prediction.scenario import check_fraction, once, one_of
from simulator.pruning import FAMILIES
from simulator.pruning._grammar import is_plan
from simulator.workload import DTYPES

MOST_QUERY = 32_000
"""Maximum length of a query, characters."""

MOST_VALUES = 100
"""Maximum number of keys of a query, and of different values of a list."""


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


def _pruning(text: str) -> str:
    """Return a text of ``--prune``, never the path of a plan."""
    if is_plan(text):
        raise InputError(f"prune {one_line(text, 40)!r}: the page opens no files; use prunesim report --prune")
    return normal(text)


def _detail(_: str, text: str) -> str:
    return text.strip() if text.strip() in (*FAMILIES, EXISTING) else _pruning(text)


def _pinned(_: str, text: str, own: Sequence[str] = ()) -> State:
    """Return the state of a query without a pin."""
    state, problems = read_problems(text, own, {key: reader for key, reader in KEYS.items() if key != "pin"})
    if problems:
        raise InputError(f"pin: {problems[0].reason}")
    return state


def _each(check: Callable[[str], Any]) -> Callable[[str, str], Any]:
    def read(key: str, text: str) -> tuple[Any, ...]:
        parts = once(part.strip() for part in text.split(",") if part.strip())
        if not parts:
            raise InputError(f"{key}: expected at least one")
        if len(parts) > MOST_VALUES:
            raise InputError(f"{key}: expected at most {MOST_VALUES} values, got {len(parts)}")
        return once(check(part) for part in parts)

    return read


FieldReader = tuple[str, Callable[[str, str], Any]]
"""Field of the state, and the reader of its value from key and text."""

# fmt: off
KEYS: Mapping[str, FieldReader] = MappingProxyType({
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
    "prune": ("prune", lambda _, text: tuple(map(_pruning, split(text)))),
    "detail": ("detail", _detail),
    "at": ("at", lambda _, text: _fraction(text)),
    "over": ("over", _word),
    "dense": ("dense_ms", _maybe(_number, None)),
    "ttft": ("ttft_ms", _maybe(_number, None)),
    "tpot": ("tpot_ms", _maybe(_number, None)),
    "price": ("price", _maybe(_number, None)),
    "versus": ("versus", _maybe(_engine, "")),
    "pin": ("pin", _maybe(_pinned, None)),
})
# fmt: on
"""Keys of a query."""


# -- the whole query ---------------------------------------------------------------------------------------------------


def to_query(state: State) -> str:
    """Return the query of a URL, without its question mark; it contains every field, and the pin if there is one.

    >>> to_query(State(gpus=("a100_sxm_80gb", "h100_sxm"), families=("depth",), sparsities=(0.25, 0.5)))[:60]
    'model=llama-3.1-8b&gpu=a100_sxm_80gb,h100_sxm&family=depth&s'
    """
    values = {key: getattr(state, name) for key, (name, _) in KEYS.items()}
    if state.pin is None:
        del values["pin"]
    return "&".join(f"{key}={quote(_text(key, value), safe=',~:')}" for key, value in values.items())


def split(text: str) -> tuple[str, ...]:
    """Return texts of ``--prune``, which are separated by semicolons or lines: layers have commas.

    >>> split("depth layers=0,5; width mlp=0.3")
    ('depth layers=0,5', 'width mlp=0.3')
    """
    return tuple(part.strip() for part in text.replace("\n", ";").split(";") if part.strip())


def _text(key: str, value: Any, comma: str = ",") -> str:
    if isinstance(value, tuple):
        return (";" if key == "prune" else comma).join(map(str, value))
    if isinstance(value, State):
        return to_query(value)
    return "" if value is None else str(value)


def read_query(query: str, own: Sequence[str] = ()) -> tuple[State, tuple[str, ...]]:
    """Return the state of a query, and one line per invalid value, which its default replaces.

    The query may have its question mark. A list is separated by commas, or its key is repeated. ``own`` are paths of
    profiles that the query may name.

    >>> state, problems = read_query("?gpu=a100&batch=0")
    >>> state.gpus, problems
    (('a100_sxm_80gb',), ('batch 0: expected a whole number from 1 to 2147483647; shown with 1',))
    """
    state, problems = read_problems(query, own)
    return state, tuple(problem.line for problem in problems)


def strict_query(query: str) -> State:
    """Return the state of a query; InputError with the first problem."""
    state, problems = read_problems(query)
    if problems:
        raise InputError(problems[0].reason)
    return state


@dataclass(frozen=True)
class Problem:
    """An invalid value of a query, and what is shown instead."""

    key: str
    reason: str
    instead: str

    @property
    def line(self) -> str:
        """Both in one line."""
        return f"{self.reason}; {self.instead}"


def read_problems(
    query: str, own: Sequence[str] = (), keys: Mapping[str, FieldReader] = KEYS
) -> tuple[State, list[Problem]]:
    """Return the state of a query, and its problems by key; of the texts of ``--prune`` the valid ones are kept."""
    default, state = State(), State()
    problems: list[Problem] = []
    if len(query) > MOST_QUERY:
        return default, [Problem("", f"address: longer than {MOST_QUERY} characters", "shown with the defaults")]
    if (count := query.count("&") + 1) > MOST_VALUES:
        reason = f"address: expected at most {MOST_VALUES} keys, got {count}"
        return default, [Problem("", reason, "shown with the defaults")]
    given: dict[str, list[str]] = {}
    for key, value in parse_qsl(query.removeprefix("?"), keep_blank_values=True, errors="replace"):
        given.setdefault(key, []).append(value)
    for key, texts in given.items():
        if key not in keys:
            problems.append(Problem(key, str(unknown("key", key, keys)), "ignored"))
            continue
        if key == "dtype" and texts[-1] in DTYPES and texts[-1] not in ARITHMETIC:
            reason = f"dtype {texts[-1]}: is a weight format; no device computes in it"
            problems.append(Problem(key, reason, "used for the weights"))
            key = "weights"
        name, read = keys[key]
        if key == "gpu":
            read = _each(partial(_gpu, own=own))
        if key == "pin":
            read = _maybe(partial(_pinned, own=own), None)
        if key == "prune":
            texts = [";".join(_valid(";".join(texts), problems))]
        shown = getattr(state, name)
        try:
            if len(texts) > 1 and not isinstance(shown, tuple):
                raise InputError(f"{key}: given {len(texts)} times, expected once")
            value = read(key, ",".join(texts))
            replace(default, **{name: value})  # alone, so that a problem names its own value
            state = replace(state, **{name: value})
        except InputError as error:
            instead = "none" if isinstance(shown, State) else _text(key, shown, ", ") or "none"
            problems.append(Problem(key, one_line(str(error), 300), f"shown with {instead}"))
    return _bounded(state, default, problems), problems


def _bounded(state: State, default: State, problems: list[Problem]) -> State:
    """Return a state that takes about a second: values that multiply the work are replaced until it is small enough."""
    for key in ("new", "prune", "versus", "sparsity", "family", "gpu", "pruned", "model"):
        if state.passes <= MOST_PASSES:
            break
        name, _ = KEYS[key]
        lighter = replace(state, **{name: getattr(default, name)})
        if lighter.passes < state.passes:
            fewer = "select fewer GPUs, families, sparsities, prunings or new tokens"
            reason = f"{key}: expected at most {MOST_PASSES:,} passes to compute, got {state.passes:,}; {fewer}"
            problems.append(Problem(key, reason, f"shown with {_text(key, getattr(default, name), ', ') or 'none'}"))
            state = lighter
    return state


def _valid(text: str, problems: list[Problem]) -> Iterator[str]:
    """Yield the valid texts of ``--prune``; add a problem for each of the others."""
    parts = split(text)
    if len(parts) > MOST_PRUNINGS:
        reason = f"prune: expected at most {MOST_PRUNINGS} of them, got {len(parts)}"
        problems.append(Problem("prune", reason, "shown with none"))
        return
    for part in parts:
        try:
            yield _pruning(part)
        except InputError as error:
            problems.append(Problem("prune", one_line(str(error), 300), "ignored"))
