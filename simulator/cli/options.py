"""Reading option texts: comma lists, numbers, NAME=VALUE pairs, and the options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.predict.settings import Setting

Hardware = Annotated[
    str, typer.Option("--hardware", metavar="LIST", help="Devices: names, aliases or YAML files, separated by commas.")
]
Phase = Annotated[
    str, typer.Option("--phase", metavar="LIST", help="prefill, decode, generate; a comma list for several.")
]
Batch = Annotated[str, typer.Option("--batch", metavar="LIST", help="Sequences in a batch; a comma list for several.")]
Seq = Annotated[
    str,
    typer.Option("--seq", metavar="LIST", help="Prompt tokens (prefill) or cached positions (decode) of a sequence."),
]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", metavar="N", help="Tokens that generate decodes after the prompt.")
]
Runtime = Annotated[
    str, typer.Option("--runtime", metavar="NAME", help="cuda_graph, or eager (the host launches every kernel).")
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="NAME", help="Number format of activations and arithmetic.")]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        "--weight-dtype", metavar="NAME", help="Format of stored weights: int8, int4, fp8; as --dtype if left out."
    ),
]
KvDtype = Annotated[
    str | None, typer.Option("--kv-dtype", metavar="NAME", help="Format of the K/V cache; as --dtype if left out.")
]
Devices = Annotated[int, typer.Option("--devices", metavar="N", help="Number of devices the model is spread over.")]
Parallel = Annotated[str, typer.Option("--parallel", metavar="NAME", help="How it is spread: tensor or pipeline.")]
Ideal = Annotated[
    bool, typer.Option("--ideal", help="Leave out the work that pruning adds (routers, gathers): an upper bound.")
]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Option of the family, such as inner=8810; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Figure = Annotated[str | None, typer.Option("--figure", metavar="FILE", help="Also draw a figure: .pdf, .svg or .png.")]


def names(option: str, text: str) -> list[str]:
    """A comma list of names.

    >>> names("--hardware", "a100, h100")
    ['a100', 'h100']
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text!r}: expected names separated by single commas")
    return parts


def integers(option: str, text: str) -> list[int]:
    """A comma list of whole numbers.

    >>> integers("--batch", "1,64")
    [1, 64]
    """
    return [_number(option, part, int) for part in names(option, text)]


def fractions(option: str, text: str) -> list[float]:
    """A comma list of numbers.

    >>> fractions("--sparsity", "0.1,0.25")
    [0.1, 0.25]
    """
    return [_number(option, part, float) for part in names(option, text)]


def sparsity(option: str, text: str) -> float | dict[str, float]:
    """One fraction, or fractions by projection kind.

    >>> sparsity("--sparsity", "0.3"), sparsity("--sparsity", "q=0.1,down=0.5")
    (0.3, {'q': 0.1, 'down': 0.5})
    """
    if "=" in text:
        return {
            name: _number(option, value, float) for name, value in (_pair(option, part) for part in names(option, text))
        }
    return float(_number(option, text, float))


def settings(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is a whole number, a number, true or false, a comma list of them, or a word.

    >>> settings("--option", ["inner=8810", "kv_dense=false", "rank=16,32"])
    {'inner': 8810, 'kv_dense': False, 'rank': [16, 32]}
    """
    out: dict[str, Any] = {}
    for text in texts or ():
        name, value = _pair(option, text)
        name = name.replace("-", "_")
        if name in out:
            raise InputError(f"{option} {text!r}: {name} is given twice")
        out[name] = [_value(part) for part in names(option, value)] if "," in value else _value(value)
    return out


def setting(
    new_tokens: int,
    runtime: str,
    dtype: str,
    weight_dtype: str | None,
    kv_dtype: str | None,
    devices: int,
    parallel: str,
) -> Setting:
    """The setting that the shared options describe."""
    from simulator.predict.settings import Setting

    return Setting(new_tokens, runtime, dtype, weight_dtype, kv_dtype, devices, parallel)


def _number(option: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{option} {text!r}: expected {wanted}") from None


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise InputError(f"{option} {text!r}: expected NAME=VALUE")
    return name, value


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
