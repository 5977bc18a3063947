"""Define the options that several commands share; :mod:`simulator.cli.parsing` parses their texts.

:class:`Run` has the options of every prediction; :func:`expanded` adds its fields to the options of a command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from simulator.cli.parsing import checked, duration, fractions, integers, names, prefix
from simulator.engines import DEFAULT_ENGINE
from simulator.errors import InputError
from simulator.units import parse_count

if TYPE_CHECKING:
    from simulator.prediction.scenario import Scenario

# option or argument -> place of the names for shell completion
NAMES: Mapping[str, str] = {
    **dict.fromkeys(("MODEL", "MODELS"), "models.library.list_models"),
    **dict.fromkeys(("PROFILE", "--hardware"), "hardware.library.list_hardware"),
    **dict.fromkeys(("--engine", "--versus"), "engines.engine.list_engines"),
    **dict.fromkeys(("--family", "--detail"), "pruning.FAMILIES"),
    "--method": "pruning._methods.METHODS",
    "--phase": "workload.PHASES",
    "--link": "hardware.link.CONNECTIONS",
    **dict.fromkeys(("--dtype", "--weight-dtype", "--kv-dtype"), "workload.DTYPES"),
}


def completing(where: str) -> Callable[[str], list[str]] | None:
    """Return the shell completion of names from a place, for the last entry of a comma list; it imports them late."""

    def complete(incomplete: str) -> list[str]:
        module, _, name = where.rpartition(".")
        found = getattr(import_module(f"simulator.{module}"), name)
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{one}" for one in (found() if callable(found) else found) if one.startswith(last)]

    return complete if where else None


def opt(flags: str, metavar: str | None, text: str) -> Any:
    """Declare an option; ``flags`` are its names, separated by blanks. An empty value is an error."""
    names = completing(NAMES.get(flags, ""))
    return typer.Option(*flags.split(), metavar=metavar, help=text, autocompletion=names, callback=_not_empty)


def _not_empty(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Reject an empty value on the command line, which a shell makes of a variable that is not set."""
    given = context.get_parameter_source(option.name or "")
    if given is not None and given.name == "COMMANDLINE" and "" in (value if isinstance(value, list) else [value]):
        raise InputError(f"{option.opts[0]}: expected {option.metavar or 'a value'}, got an empty value")
    return value


def arg(metavar: str, text: str, like: str = "") -> Any:
    """Declare an argument; shell completion uses the entry ``like`` of :data:`NAMES`, else that of ``metavar``."""
    return typer.Argument(metavar=metavar, help=text, autocompletion=completing(NAMES.get(like or metavar, "")))


# fmt: off
Model = Annotated[str, arg("MODEL", "Name of a model, or its Hugging Face config.json (file or folder).")]
Hardware = Annotated[str, opt(
    "--hardware", "LIST", "Devices: names, aliases or YAML files, NAME@STACK, separated by commas.")]
SameStack = Annotated[bool, opt(
    "--same-stack", None, "Your stack is the one the profile was fitted on; narrows the intervals.")]
Phase = Annotated[str, opt("--phase", "LIST", "prefill, decode, generate, serve; a comma list for several.")]
Batch = Annotated[str, opt("--batch", "LIST", "Sequences in a batch: a list, or a range such as 1:64 (powers of two).")]
Seq = Annotated[str, opt(
    "--seq", "LIST", "Prompt tokens (prefill) or cached positions (decode): a list, or a range (512:32k).")]
NewTokens = Annotated[int, opt("--new-tokens", "N", "Tokens decoded after the prompt, in generate and serve.")]
Engine = Annotated[str, opt(
    "--engine", "NAME", "Engine (see prunesim engines list), with @VERSION for an older one, or YAML file.")]
Dtype = Annotated[str, opt("--dtype", "NAME", "Number format of activations and arithmetic.")]
WeightDtype = Annotated[str | None, opt(
    "--weight-dtype", "NAME", "Format of stored weights: int8, int4, fp8. Default: the checkpoint's, else --dtype.")]
Ideal = Annotated[bool, opt("--ideal", None, "Exclude the work that pruning adds (routers, gathers): an upper bound.")]
Option = Annotated[list[str] | None, opt(
    "--option", "NAME=VALUE", "Option of the family, such as inner=8810; may be repeated.")]
Pruned = Annotated[str | None, opt(
    "--pruned", "LIST", "Existing pruned models instead of families: checkpoints or config.json.")]
Prune = Annotated[list[str] | None, opt(
    "--prune", "TEXT", "A pruning: 'width mlp=0.3 heads=0.2 + depth 0.25', or a plan.yaml; may be repeated. "
    "Parts of width: attention, heads, kv, mlp, hidden. Families: depth, width, width_cross, low_rank, "
    "semi_structured, unstructured, dynamic_depth, dynamic_width, sparse_attention, token, kv_cache, experts.")]
Json = Annotated[bool, opt("--json", None, "Print JSON instead of a table.")]
Verbose = Annotated[bool, opt("--verbose", None, "Print all tables and notes, not only the most important.")]
Figure = Annotated[str | None, opt("--figure", "FILE", "Also draw a figure: .pdf, .svg or .png.")]


@dataclass(frozen=True)
class Prunings:
    """Options that choose prunings, as texts of the command line."""

    family: Annotated[str | None, opt("--family", "LIST", "Pruning families. Default: all.")] = None
    method: Annotated[str | None, opt(
        "--method", "LIST", "Published methods instead of families: see prunesim methods.")] = None
    pruned: Pruned = None
    prune: Prune = None
    sparsity: Annotated[str | None, opt(
        "--sparsity", "LIST", "Fractions removed, in [0, 1). Default: 0.1,0.25,0.5, or those of a method's "
        "paper.")] = None

    def parsed(self) -> dict[str, Any]:
        """Return the arguments of :func:`simulator.table`."""
        return {
            "family": None if self.family is None else names("--family", self.family),
            "method": [] if self.method is None else names("--method", self.method),
            "pruned": [] if self.pruned is None else names("--pruned", self.pruned),
            "prune": self.prune or [],
            "sparsity": None if self.sparsity is None else fractions("--sparsity", self.sparsity),
        }


@dataclass(frozen=True)
class Run:
    """Options of every prediction, as texts of the command line."""

    phase: Phase = "decode"
    batch: Batch = "1"
    concurrency: Annotated[int | None, opt(
        "--concurrency", "N", "Requests in flight for --phase serve (replaces --batch).")] = None
    seq: Seq = "2048"
    new_tokens: NewTokens = 128
    cached_prefix: Annotated[str | None, opt(
        "--cached-prefix", "N", "Tokens of each prompt in the prefix cache, or a share of the prompt (25%).")] = None
    token_budget: Annotated[str | None, opt(
        "--token-budget", "N", "Most tokens of a step. Default: the engine's on the GPU (8192 in vLLM).")] = None
    engine: Annotated[str, opt(
        "--engine", "LIST", "Engines (see prunesim engines list), with @VERSION for older ones (vllm@0.10), or "
        "YAML files; a comma list.")] = DEFAULT_ENGINE
    dtype: Dtype = "bf16"
    weight_dtype: WeightDtype = None
    kv_dtype: Annotated[str | None, opt(
        "--kv-dtype", "NAME", "Format of the K/V cache. Default: --dtype, or bf16 below 16 bits.")] = None
    devices: Annotated[int, opt("--devices --tp", "N", "Number of devices that share the model.")] = 1
    link: Annotated[str | None, opt(
        "--link", "NAME", "What joins the devices: nvswitch, xgmi, bridge, pcie, pcie-host; pcie4x8 and so on. "
        "Default: the hardware's.")] = None
    parallel: Annotated[str, opt(
        "--parallel", "NAME", "How devices share the model: tensor, expert or pipeline.")] = "tensor"
    skew: Annotated[float | None, opt(
        "--skew", "X", "Load of routed experts. 0: uniform; 1: busiest expert has 200 times the load of the "
        "least busy.")] = None

    def requests(self, known: Known | None = None, *, model: str = "", ideal: bool = False) -> Requests:
        """Parse the options, with a measured time of the dense ``model``, if any."""
        from simulator.operators.experts import EXPERT_SKEW
        from simulator.prediction.scenario import Scenario

        if self.concurrency is not None and (self.batch != "1" or self.phase != "serve"):
            raise InputError("--concurrency: expected with --phase serve, instead of --batch")
        if self.link is not None and self.devices == 1:
            raise InputError("--link: expected with --devices of at least 2")
        budget = self.token_budget
        scenario = Scenario(
            new_tokens=self.new_tokens,
            cached_prefix=0.0 if self.cached_prefix is None else prefix(self.cached_prefix),
            token_budget=None if budget is None else checked("--token-budget", budget, parse_count),
            dtype=self.dtype,
            weight_dtype=self.weight_dtype,
            kv_dtype=self.kv_dtype,
            devices=self.devices,
            parallel=self.parallel,
            link=self.link,
            skew=EXPERT_SKEW if self.skew is None else self.skew,
            ideal=ideal,
        )
        found = Requests(
            phase=names("--phase", self.phase),
            batch=integers("--batch", self.batch) if self.concurrency is None else [self.concurrency],
            seq=integers("--seq", self.seq),
            engine=names("--engine", self.engine),
            scenario=scenario,
        )
        return found if known is None else known.added(found, model)


@dataclass(frozen=True)
class Requests:
    """Axes of a prediction for :func:`simulator.table`, their common scenario, and notes on a measured time."""

    phase: Sequence[str]
    batch: Sequence[int]
    seq: Sequence[int]
    engine: Sequence[str]
    scenario: Scenario
    notes: tuple[str, ...] = ()

    @property
    def axes(self) -> dict[str, Any]:
        """Axes and scenario by name."""
        return {name: getattr(self, name) for name in ("phase", "batch", "seq", "engine", "scenario")}


@dataclass(frozen=True)
class Known:
    """A measured time of the dense model, as texts of the command line."""

    dense_time: Annotated[str | None, opt(
        "--dense-time", "TIME", "Measured time of the dense model in this scenario, such as 18.6ms.")] = None
    dense_tokens_per_s: Annotated[float | None, opt(
        "--dense-tokens-per-s", "X", "Instead of --dense-time: new tokens/s over all sequences.")] = None
    dense_from: Annotated[str | None, opt(
        "--dense-from", "FILE", "Instead of --dense-time: result of vllm bench, SGLang, trtllm-bench, "
        "genai-perf or AIPerf for this request.")] = None

    def added(self, requests: Requests, model: str) -> Requests:
        """Return requests with the measured time of the dense ``model`` in the scenario."""
        given = sum(value is not None for value in (self.dense_time, self.dense_tokens_per_s, self.dense_from))
        if not given:
            return requests
        if given > 1:
            raise InputError("--dense-time, --dense-tokens-per-s, --dense-from: expected one of them")
        from simulator.prediction.scenario import dense_seconds

        phase, batch, seq, notes = requests.phase[0], requests.batch[0], requests.seq[0], requests.notes
        if self.dense_time is not None:
            seconds = duration("--dense-time", self.dense_time)
        elif self.dense_from is not None:
            from simulator.prediction.measured import measured

            engine, shapes = requests.engine[0], ((batch, seq),)
            one = replace(requests.scenario, model=model, engine=engine, phase=phase, shapes=shapes)
            found = measured(self.dense_from, one)
            seconds, notes = found.seconds, (*notes, *found.notes)
        else:
            seconds = dense_seconds(self.dense_tokens_per_s, phase, batch, seq, requests.scenario.new_tokens)
        return replace(requests, scenario=replace(requests.scenario, dense_s=seconds), notes=notes)


# fmt: on
KNOWN, PRUNINGS, RUN = Known(), Prunings(), Run()  # defaults of the parameters of commands


def expanded(*omitted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator of commands that replaces parameters which default to a dataclass of options (as :data:`RUN`)
    by these options and defaults; omitted options keep their defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # not get_type_hints: in Python 3.10 it hides the Annotated of parameters that default to None
        types, parameters = inspect.get_annotations(command, eval_str=True), []
        groups: dict[str, tuple[Any, list[str]]] = {}
        for p in inspect.signature(command).parameters.values():
            parts = [(p.name, p.default, types[p.name])]
            if is_dataclass(p.default):
                hints = get_type_hints(type(p.default), include_extras=True)
                shared = [f.name for f in fields(p.default) if f.name not in omitted]
                groups[p.name] = p.default, shared
                parts = [(name, getattr(p.default, name), hints[name]) for name in shared]
            for name, default, kind in parts:
                parameters.append(inspect.Parameter(name, p.KEYWORD_ONLY, default=default, annotation=kind))

        @wraps(command)
        def called(**given: Any) -> None:
            for name, (default, shared) in groups.items():
                given[name] = replace(default, **{option: given.pop(option) for option in shared})
            command(**given)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate
