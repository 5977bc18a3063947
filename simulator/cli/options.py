"""Define the options that several commands share; :mod:`simulator.cli.parsing` parses their texts.

Options that belong together are a dataclass (:data:`RUN`: the settings of a request);
:func:`expanded` adds its fields to the options of a command.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cached_property, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from simulator.cli import render
from simulator.cli.parsing import checked, fractions, integers, names
from simulator.errors import InputError
from simulator.names import BENCHMARKS
from simulator.request import SETTINGS, Flag, Setting, Whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simulator.figures.style import PaperSize
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


def option(metavar: str | None, text: str, default: Any = None, *, flags: str = "") -> Any:
    """Declare an option and its default, as a field of a group of options or as a parameter of an
    :func:`expanded` command. Its name is that of the field, or ``flags``."""
    return field(default=default, metadata={"option": (flags, metavar, text)})


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
    hardware: str = option(
        "LIST", "Devices: names, aliases or YAML files, NAME@STACK, separated by commas.", REQUIRED
    )
    same_stack: bool = option(
        None, "Your stack is the one the profile was fitted on; narrows the intervals.", False
    )

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

    @property
    def one(self) -> Any:
        if len(found := self.profiles) != 1:
            raise InputError(f"--hardware: expected one device, got {len(found)}")
        return found[0]


@dataclass(frozen=True)
class Prunings:
    family: str | None = option("LIST", "Pruning families. Default: all.")
    method: str | None = option(
        "LIST", "Published methods instead of families: see prunesim methods."
    )
    pruned: Pruned = None
    prune: Prune = None
    sparsity: str | None = option(
        "LIST", "Fractions removed, in [0, 1). Default: 0.1,0.25,0.5, or those of a method's paper."
    )

    @property
    def named(self) -> bool:
        return bool(self.prune or self.pruned or self.method)

    def parsed(self) -> dict[str, Any]:
        texts = {"family": self.family, "method": self.method, "pruned": self.pruned}
        given: dict[str, Any] = {
            name: names(f"--{name}", text) for name, text in texts.items() if text is not None
        }
        if self.prune:
            given["prune"] = self.prune
        if self.sparsity is not None:
            given["sparsity"] = fractions("--sparsity", self.sparsity)
        return given


@dataclass(frozen=True)
class Metered:
    energy: bool = option(None, "Also show energy: joules per token, energy saved, watts.", False)
    electricity: float | None = option("X", "Price of a kWh, for the cost; implies --energy.")
    carbon: float | None = option("X", "CO2 per kWh, g, for carbon; implies --energy.")
    pue: float | None = option("X", "Energy with cooling over energy of servers; implies --energy.")
    host_watts: float | None = option("X", "Power of the host per GPU, W; implies --energy.")

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
    """Output of a command: --json, --csv or a table, and figures."""

    json: Json = False
    csv: str | None = option("FILE", "Also write CSV with exact numbers; - is standard output.")
    figure: str | None = option("FILE", "Also draw a figure: .pdf, .svg or .png.")
    width: Width = None
    font: Font = None
    verbose: Verbose = False

    @cached_property
    def paper(self) -> PaperSize:
        from simulator.figures.style import PaperSize

        return PaperSize.read(self.width, self.font)

    def check(self, *figures: str | None) -> None:
        """Refuse output that cannot be written, before any work; ``figures`` are files of further
        figures."""
        if self.json and self.csv:
            raise InputError("--json and --csv: expected one of them")
        drawn = [path for path in (self.figure, *figures) if path]
        for path in drawn:
            from simulator.figures.style import check_figure

            check_figure(path)
        for option in ("width", "font"):
            if getattr(self, option) is not None and not drawn:
                raise InputError(f"--{option}: expected with --figure FILE")
        if drawn:
            _ = self.paper  # refuses a bad size
        if self.csv and self.csv != "-":
            from simulator.files.write import check_target

            check_target(self.csv)

    def draw(self, figure: Callable[[], Figure], path: str | None = None) -> None:
        """Draw a figure in the size of --width and --font, and write it to ``path`` or --figure."""
        from simulator.figures.style import save_figure

        with self.paper.applied():
            save_figure(figure(), path or self.figure or "")

    def write(
        self, rows: Sequence[Mapping[str, Any]], for_csv: Sequence[Mapping[str, Any]] | None = None
    ) -> bool:
        """Write rows (CSV: ``for_csv``, if given); return whether to print the answer too. After
        CSV on standard output, it goes to standard error."""
        if self.json:
            render.show_json(rows)
        elif self.csv:
            from simulator.files.csv import csv_text

            text = csv_text(rows if for_csv is None else for_csv)
            if self.csv == "-":
                print(text, end="", flush=True)
                sys.stdout = sys.stderr  # until the end of :func:`simulator.cli.program.run`
            else:
                from simulator.files.write import write_whole

                write_whole(self.csv, text.encode())
        return not self.json


class Asked(NamedTuple):
    """Settings of a request by name, of which some are lists, and notes on a measured time."""

    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


# other ways to state the batch and a measured time: option -> type of its value, declaration
_OTHERS: Mapping[str, tuple[Any, Any]] = {
    "concurrency": (
        str | None,
        option("LIST", "Requests in flight for --phase serve (replaces --batch)."),
    ),
    "dense_tokens_per_s": (
        float | None,
        option("X", "Instead of --dense-time: new tokens/s over all sequences."),
    ),
    "dense_from": (
        str | None,
        option("FILE", f"Instead of --dense-time: result of {BENCHMARKS} for this request."),
    ),
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


def single(settings: Mapping[str, Any], *several: str) -> dict[str, Any]:
    """Return the settings of one request; only the settings ``several`` may have several values."""
    lists = {
        name: value
        for name, value in settings.items()
        if isinstance(value, list) and name not in several
    }
    for name, value in lists.items():
        if len(value) != 1:
            raise InputError(f"{SETTINGS[name].flags[0]}: expected one value, got {len(value)}")
    return {**settings, **{name: value for name, (value,) in lists.items()}}


def _parsed(setting: Setting, given: Any) -> Any:
    option = setting.flags[0]
    if isinstance(setting.accepts, Flag):
        return given
    if setting.several:
        values = (integers if isinstance(setting.accepts, Whole) else names)(option, given)
        return [setting.check(value, option) for value in values]
    return setting.check(checked(option, given, setting.accepts.parse), option)


def setting_option(name: str, metavar: str = "", text: str = "", default: Any = None) -> Any:
    """Declare the option of a setting; ``metavar`` and ``text`` replace its own."""
    setting = SETTINGS[name]
    flags = " ".join(setting.flags)
    return option(metavar or setting.metavar, text or setting.help, default, flags=flags)


def run_options(*chosen: str, others: bool = False, **defaults: str | None) -> Any:
    """Return a :class:`Run` with the options of some settings, as a dataclass of their defaults."""
    parts = []
    for name in chosen:
        setting = SETTINGS[name]
        flag = isinstance(setting.accepts, Flag)
        default: Any = setting.default
        if not flag:
            default = None if default in (None, 0.0) else str(default)
        # the help of a setting without its usual default
        text = setting.help.partition(" Default:")[0] if name in defaults else ""
        declared = setting_option(name, text=text, default=defaults.get(name, default))
        parts.append((name, bool if flag else str | None, declared))
    parts += [(name, *declared) for name, declared in _OTHERS.items() if others]
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
            if not is_dataclass(p.default):
                parameters.append(_parameter(p.name, types[p.name], p.default, p.default))
                continue
            hints = get_type_hints(type(p.default), include_extras=True)
            without = {*omitted, *(("width", "font") if "figure" in omitted else ())}
            shared = [f for f in fields(p.default) if f.name not in without]
            groups[p.name] = p.default, [f.name for f in shared]
            parameters += [
                _parameter(f.name, hints[f.name], f, getattr(p.default, f.name)) for f in shared
            ]

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


def _parameter(name: str, kind: Any, declared: Any, default: Any) -> inspect.Parameter:
    """Return a parameter of a command as typer reads it; ``declared`` may be an :func:`option`."""
    if isinstance(declared, Field):
        default = declared.default if default is declared else default
        if "option" in declared.metadata:
            flags, metavar, text = declared.metadata["option"]
            kind = Annotated[kind, opt(flags or f"--{name.replace('_', '-')}", metavar, text)]
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=empty if default == REQUIRED else default,
        annotation=kind,
    )
