"""Define the options that several commands share; :mod:`simulator.cli.parsing` parses their texts.

Options that belong together are a dataclass (:data:`RUN`: the settings of a request);
:func:`expanded` adds its fields to the options of a command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cached_property, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from simulator.cli import render
from simulator.cli.parsing import checked, fractions, integers, names, settings
from simulator.errors import InputError
from simulator.names import BENCHMARKS
from simulator.request import SETTINGS, Flag, Setting, Whole

if TYPE_CHECKING:
    from simulator.prediction.tariff import Tariff

# option or argument -> place of the names for shell completion
NAMES: Mapping[str, str] = {
    **dict.fromkeys(("MODEL", "MODELS"), "models.library.list_models"),
    **dict.fromkeys(("PROFILE", "--hardware"), "hardware.library.list_hardware"),
    **dict.fromkeys(("--engine", "--versus"), "engines.engine.list_engines"),
    **dict.fromkeys(("--family", "--detail"), "pruning.FAMILIES"),
    "--method": "pruning._methods.METHODS",
    "--phase": "names.PHASES",
    "--link": "names.CONNECTIONS",
    **dict.fromkeys(("--dtype", "--weight-dtype", "--kv-dtype"), "names.DTYPES"),
}


def completing(where: str) -> Callable[[str], list[str]] | None:
    """Return the shell completion of names from a place, for the last entry of a comma list; it
    imports them late."""

    def complete(incomplete: str) -> list[str]:
        module, _, name = where.rpartition(".")
        found = getattr(import_module(f"simulator.{module}"), name)
        before, comma, last = incomplete.rpartition(",")
        return [
            f"{before}{comma}{one}"
            for one in (found() if callable(found) else found)
            if one.startswith(last)
        ]

    return complete if where else None


def opt(flags: str, metavar: str | None, text: str) -> Any:
    """Declare an option; ``flags`` are its names, separated by blanks. An empty value is an
    error."""
    names = completing(NAMES.get(flags, ""))
    return typer.Option(
        *flags.split(), metavar=metavar, help=text, autocompletion=names, callback=_not_empty
    )


def _not_empty(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Reject an empty value on the command line, which a shell makes of a variable that is not
    set."""
    given = context.get_parameter_source(option.name or "")
    if (
        given is not None
        and given.name == "COMMANDLINE"
        and "" in (value if isinstance(value, list) else [value])
    ):
        raise InputError(
            f"{option.opts[0]}: expected {option.metavar or 'a value'}, got an empty value"
        )
    if isinstance(value, str) and value.startswith("--"):
        raise InputError(
            f"{option.opts[0]}: its value is missing; expected {option.metavar}, got the option"
            f" {value}"
        )
    return value


def arg(metavar: str, text: str, like: str = "") -> Any:
    """Declare an argument; shell completion uses the entry ``like`` of :data:`NAMES`, else that of
    ``metavar``."""
    return typer.Argument(
        metavar=metavar, help=text, autocompletion=completing(NAMES.get(like or metavar, ""))
    )


Model = Annotated[
    str, arg("MODEL", "Name of a model, or its Hugging Face config.json (file or folder).")
]
Json = Annotated[bool, opt("--json", None, "Print JSON instead of a table.")]
Verbose = Annotated[
    bool, opt("--verbose", None, "Print all tables and notes, not only the most important.")
]
Pruned = Annotated[
    str | None,
    opt(
        "--pruned",
        "LIST",
        "Existing pruned models instead of families: checkpoints or config.json.",
    ),
]
Prune = Annotated[
    list[str] | None,
    opt(
        "--prune",
        "TEXT",
        "A pruning: 'width mlp=0.3 heads=0.2 + depth 0.25', sizes that remain: 'width mlp=9216 +"
        " depth 24', or a plan.yaml; may be repeated. Parts of width: attention, heads, kv, mlp,"
        " hidden, mamba_heads, mamba_channels, mamba_state; of depth: attention, mlp, mamba, conv."
        " Families: depth, width, width_cross, low_rank, semi_structured (2:4),"
        " unstructured, dynamic_depth, dynamic_width, sparse_attention, token, kv_cache, experts.",
    ),
]
REQUIRED = "<required>"  # default of an option in a group that has none


@dataclass(frozen=True)
class Devices:
    hardware: Annotated[
        str,
        opt(
            "--hardware",
            "LIST",
            "Devices: names, aliases or YAML files, NAME@STACK, separated by commas.",
        ),
    ] = REQUIRED
    same_stack: Annotated[
        bool,
        opt(
            "--same-stack",
            None,
            "Your stack is the one the profile was fitted on; narrows the intervals.",
        ),
    ] = False

    @cached_property
    def profiles(self) -> list[Any]:
        from simulator.hardware.library import load_hardware

        found = [
            load_hardware(name, same_stack=self.same_stack)
            for name in names("--hardware", self.hardware)
        ]
        advised = "its calibration advised against this profile"
        render.notes(
            f"{hw.label}: {advised} ({hw.verdict}); calibrate the device again"
            for hw in found
            if hw.verdict
        )
        return found


@dataclass(frozen=True)
class Prunings:
    family: Annotated[str | None, opt("--family", "LIST", "Pruning families. Default: all.")] = None
    method: Annotated[
        str | None,
        opt("--method", "LIST", "Published methods instead of families: see prunesim methods."),
    ] = None
    pruned: Pruned = None
    prune: Prune = None
    sparsity: Annotated[
        str | None,
        opt(
            "--sparsity",
            "LIST",
            "Fractions removed, in [0, 1). Default: 0.1,0.25,0.5, or those of a method's paper.",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        opt("--option", "NAME=VALUE", "Option of the family, such as inner=8810; may be repeated."),
    ] = None

    @property
    def named(self) -> bool:
        return bool(self.prune or self.pruned or self.method)

    def parsed(self) -> dict[str, Any]:
        texts = {"family": self.family, "method": self.method, "pruned": self.pruned}
        given: dict[str, Any] = {
            name: names(f"--{name}", text) for name, text in texts.items() if text is not None
        }
        given |= {"prune": self.prune} if self.prune else {}
        given |= (
            {} if self.sparsity is None else {"sparsity": fractions("--sparsity", self.sparsity)}
        )
        if self.option:
            families = given.get("family", ["all"])
            if not self.method and (len(families) > 1 or families == ["all"]):
                raise InputError("--option: expected one family: options belong to a family")
            given["options"] = settings("--option", self.option)
        return given


@dataclass(frozen=True)
class Metered:
    energy: Annotated[
        bool, opt("--energy", None, "Also show energy: joules per token, energy saved, watts.")
    ] = False
    electricity: Annotated[
        float | None, opt("--electricity", "X", "Price of a kWh, for the cost; implies --energy.")
    ] = None
    carbon: Annotated[
        float | None, opt("--carbon", "X", "CO2 per kWh, g, for carbon; implies --energy.")
    ] = None
    pue: Annotated[
        float | None,
        opt("--pue", "X", "Energy with cooling over energy of servers; implies --energy."),
    ] = None
    host_watts: Annotated[
        float | None, opt("--host-watts", "X", "Power of the host per GPU, W; implies --energy.")
    ] = None

    @property
    def tariff(self) -> Tariff | None:
        """What energy costs, if energy is requested."""
        from simulator.prediction.tariff import PRICES, Tariff

        given = {name: value for name in PRICES if (value := getattr(self, name)) is not None}
        return Tariff(**given) if given or self.energy else None


Width = Annotated[
    str | None, opt("--width", "LENGTH", "Width of the figure, such as 5.5in, 84mm or 240pt.")
]
Font = Annotated[
    float | None,
    opt("--font", "POINTS", "Font size of the figure's labels at that width. Default: 7."),
]


@dataclass(frozen=True)
class Output:
    json: Json = False
    csv: Annotated[
        str | None, opt("--csv", "FILE", "Also write CSV with exact numbers; - is standard output.")
    ] = None
    figure: Annotated[
        str | None, opt("--figure", "FILE", "Also draw a figure: .pdf, .svg or .png.")
    ] = None
    width: Width = None
    font: Font = None
    verbose: Verbose = False


class Asked(NamedTuple):
    """Settings of a request by name, of which some are lists, and notes on a measured time."""

    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


# other ways to state the batch and a measured time
_OTHERS: Mapping[str, Any] = {
    "concurrency": Annotated[
        str | None,
        opt("--concurrency", "LIST", "Requests in flight for --phase serve (replaces --batch)."),
    ],
    "dense_tokens_per_s": Annotated[
        float | None,
        opt(
            "--dense-tokens-per-s", "X", "Instead of --dense-time: new tokens/s over all sequences."
        ),
    ],
    "dense_from": Annotated[
        str | None,
        opt(
            "--dense-from",
            "FILE",
            f"Instead of --dense-time: result of {BENCHMARKS} for this request.",
        ),
    ],
}


class Run:
    """Settings of a request as texts of the command line: attributes with the names of the
    settings, and others."""

    def text(self, name: str) -> Any:
        """Return the text of a setting; None if the command has no such option."""
        return getattr(self, name, None)

    @property
    def given(self) -> dict[str, Any]:
        """Texts that differ from the defaults, by option without its dashes."""
        own: Any = self  # a dataclass, see run_options
        changed = {
            f.name: value for f in fields(own) if (value := getattr(self, f.name)) != f.default
        }
        return {
            SETTINGS[n].flags[0][2:] if n in SETTINGS else n: value for n, value in changed.items()
        }

    def asked(
        self, model: str = "", devices: Devices | None = None, prunings: Prunings | None = None
    ) -> Asked:
        """Parse the options, with a measured time of the dense ``model``, without engines that
        cannot run it."""
        from simulator.prediction.notes import limit_notes

        found = self._asked(model, devices, prunings)
        limited = limit_notes(found.settings.get("power_limit"))
        return found._replace(notes=(*limited, *found.notes))

    def _asked(self, model: str, devices: Devices | None, prunings: Prunings | None) -> Asked:
        parsed = {
            name: _parsed(setting, text)
            for name, setting in SETTINGS.items()
            if (text := self.text(name)) is not None
        }
        concurrency, rate, file = map(self.text, _OTHERS)
        if concurrency is not None:
            if parsed["batch"] != [1] or parsed["phase"] != ["serve"]:
                raise InputError("--concurrency: expected with --phase serve, instead of --batch")
            parsed["batch"] = integers("--concurrency", concurrency)
        if "link" in parsed and parsed.get("devices") == [1]:
            raise InputError("--link: expected with --devices of at least 2")
        if sum(way is not None for way in (parsed.get("dense_s"), rate, file)) > 1:
            raise InputError(
                "--dense-time, --dense-tokens-per-s, --dense-from: expected one of them"
            )
        if rate is None and file is None:
            if devices is None or len(parsed["engine"]) == 1:
                return Asked(parsed)
            return _able(parsed, model, devices, prunings)
        from simulator.prediction.benchmarks import measured
        from simulator.prediction.requests import dense_seconds, requests_of

        request = requests_of([model], parsed)[0]
        if file is None:
            return Asked(parsed | {"dense_s": dense_seconds(rate, request)})
        seconds, _, notes = measured(file, request)
        return Asked(parsed | {"dense_s": seconds}, notes)


def _able(parsed: dict[str, Any], model: str, devices: Devices, prunings: Prunings | None) -> Asked:
    """Exclude the engines that cannot run a model."""
    from simulator.prediction.table import unable

    pruned = prunings.parsed() if prunings else {}
    reasons = unable(model, devices.profiles, {**parsed, **pruned})
    engines = [engine for engine in parsed["engine"] if engine not in reasons]
    notes = tuple(f"{engine} is excluded: {reason}" for engine, reason in reasons.items())
    return Asked(parsed | {"engine": engines}, notes)


def _parsed(setting: Setting, given: Any) -> Any:
    option = setting.flags[0]
    if isinstance(setting.accepts, Flag):
        return given
    if setting.several:
        values = (integers if isinstance(setting.accepts, Whole) else names)(option, given)
        return [setting.check(value, option) for value in values]
    return setting.check(checked(option, given, setting.accepts.parse), option)


def setting_option(name: str, metavar: str = "", text: str = "") -> Any:
    """Return the annotation of a setting's option; ``metavar`` and ``text`` replace its own."""
    setting = SETTINGS[name]
    kind = bool if isinstance(setting.accepts, Flag) else str | None
    return Annotated[
        kind, opt(" ".join(setting.flags), metavar or setting.metavar, text or setting.help)
    ]


def _default(setting: Setting) -> Any:
    if isinstance(setting.accepts, Flag):
        return setting.default
    return None if setting.default in (None, 0.0) else str(setting.default)


def run_options(*chosen: str, others: bool = False, **defaults: str | None) -> Any:
    """Return a :class:`Run` with the options of some settings, as a dataclass of their defaults."""
    # the help of a setting without its usual default
    texts = {name: SETTINGS[name].help.partition(" Default:")[0] for name in defaults}
    parts = [
        (
            n,
            setting_option(n, text=texts.get(n, "")),
            field(default=defaults.get(n, _default(SETTINGS[n]))),
        )
        for n in chosen
    ]
    parts += [(n, annotation, field(default=None)) for n, annotation in _OTHERS.items() if others]
    return make_dataclass("Settings", parts, bases=(Run,), frozen=True)()


RUN: Run = run_options(*SETTINGS, others=True)  # the options of every request, with their defaults
DEVICES, PRUNINGS, METERED, OUTPUT = Devices(), Prunings(), Metered(), Output()


def expanded(*omitted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator of commands that replaces parameters which default to a dataclass of
    options (as :data:`RUN`) by these options and defaults; omitted options keep their defaults."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # not get_type_hints: in Python 3.10 it hides the Annotated of parameters that default to
        # None
        types, parameters = inspect.get_annotations(command, eval_str=True), []
        groups: dict[str, tuple[Any, list[str]]] = {}
        for p in inspect.signature(command).parameters.values():
            parts = [(p.name, p.default, types[p.name])]
            if is_dataclass(p.default):
                hints = get_type_hints(type(p.default), include_extras=True)
                without = {*omitted, *(("width", "font") if "figure" in omitted else ())}
                shared = [f.name for f in fields(p.default) if f.name not in without]
                groups[p.name] = p.default, shared
                parts = [(name, getattr(p.default, name), hints[name]) for name in shared]
            for name, default, kind in parts:
                value = inspect.Parameter.empty if default == REQUIRED else default
                parameters.append(
                    inspect.Parameter(name, p.KEYWORD_ONLY, default=value, annotation=kind)
                )

        @wraps(command)
        def called(**given: Any) -> None:
            made = {
                name: replace(default, **{option: given.pop(option) for option in shared})
                for name, (default, shared) in groups.items()
            }
            command(**given, **made)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate
