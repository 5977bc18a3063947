"""Arguments of a wrong kind are refused in one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import simulator
from simulator.errors import InputError
from simulator.request import Request

pytestmark = pytest.mark.quick

NAN, INF = float("nan"), float("inf")
TEXT: list[Any] = ["8", b"8", None, [8, "x"], {}, 8 + 1j]
NUMBERS: list[Any] = [*TEXT, True, NAN, -3, 1e300, 10**400, [[8], [8, 9]], np.array([8, NAN, 8])]
SIZES: list[Any] = [*NUMBERS, 2.5, INF, np.array([8, 2.5, 8]), 0]
SHAPED: list[Any] = [np.full(2, 8)]  # beside arrays of three

HW = simulator.load_hardware("h100")
MODEL = simulator.load_model("llama-3.2-1b")
DENSE = simulator.lower(MODEL, phase="decode", batch=1, seq=64)
PRUNED = simulator.prune(DENSE, "depth", 0.25)
THREE = np.array([8, 16, 24])

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "gemm_time": (
        simulator.gemm_time,
        {"m": THREE, "n": THREE, "k": 64, "hw": HW},
        {"m": [*SIZES, *SHAPED], "n": [*SIZES, *SHAPED], "k": [*SIZES, *SHAPED, 2**31]}
        | {"kernel": [7, 0.5, "2:4", True, ["dense", None], ["dense", "x", "dense"]]}
        | {
            "dtype": [8, []],
            "weight_dtype": ["x", []],
            "hw": [3, None],
            "options": [3, {"level": 0.9}],
        },
    ),
    "GemmOptions": (
        lambda **options: simulator.gemm_time(
            THREE, THREE, 64, HW, options=simulator.GemmOptions(**options)
        ),
        {},
        {
            "copies": [0, -1, NAN, 1.5, True, "8", *SHAPED],
            "level": [0, 1, NAN, "0.9", True, None],
            "detail": ["no", 2],
        }
        | {"density": [*NUMBERS[:-1], INF, 1.5]},
    ),
    "lower": (
        partial(simulator.lower, MODEL),
        {"phase": "generate", "new_tokens": 2},
        dict.fromkeys(("batch", "seq", "new_tokens", "devices"), SIZES)
        | {"skew": [*(n for n in NUMBERS if n is not None), INF], "parallel": [[], 3]}
        | {"engine": [0, None, {}], "dtype": [8, "fp7"]},
    ),
    "prune": (
        simulator.prune,
        {"workload": DENSE, "pruning": "width", "sparsity": 0.25},
        {
            "workload": ["llama", None],
            "pruning": [3, []],
            "sparsity": [*(x for x in NUMBERS if x is not None), 1, INF],
            "ideal": [1, "yes"],
        }
        | {"align": [0, 2.5, True, 10**30]},
    ),
    "speedup": (
        simulator.speedup,
        {"dense": DENSE, "pruned": PRUNED, "hw": HW},
        {"dense": [None, 3], "pruned": ["depth"], "hw": [None], "level": [0, 1, NAN, "x"]}
        | {"dense_s": [NAN, INF, -1, 0, True, "1 ms", [1.0]]},
    ),
    "speedups": (
        simulator.speedups,
        {"dense": DENSE, "pruned": [PRUNED], "hw": HW},
        {"pruned": [3, ["depth"]]},
    ),
    "workload_time": (
        simulator.workload_time,
        {"w": DENSE, "hw": HW},
        {"w": ["x"], "hw": [None], "level": [0, "x"]},
    ),
    "memory": (
        simulator.memory,
        {"workload": DENSE, "hw": HW},
        {"workload": [None], "hw": [3.0], "reserve_bytes": [*NUMBERS, INF]},
    ),
    "table": (
        simulator.table,
        {
            "models": [MODEL],
            "hardware": [HW],
            "family": ["depth"],
            "sparsity": [0.25],
            "batch": [1],
            "seq": [64],
        },
        {
            "models": [[3], None],
            "hardware": [None, [3]],
            "family": [3, [[]]],
            "sparsity": ["5", [NAN]],
        }
        | {
            "batch": [None, [0], 2.5, [True], ["8"], [[]]],
            "seq": [{}, [NAN]],
            "phase": ["decoding", [3]],
        }
        | {"options": ["align", 3], "method": [3], "engine": [3], "pruned": [{}], "prune": [3]},
    ),
    "Request": (
        Request,
        {},
        {
            "new_tokens": [-1, 2.5, True, "8"],
            "devices": SIZES,
            "skew": [n for n in NUMBERS if n is not None],
            "level": [*NUMBERS, 1],
        }
        | {"engine": [0], "batch": [None, 0, 2.5, True, "8"]}
        | {"dense_s": [NAN, True, "1", 0], "dtype": [8], "parallel": [[]]},
    ),
    "Workload": (
        simulator.Workload.from_columns,
        {"m": THREE, "n": 8, "k": 8},
        {
            "n": [*SIZES[:-1], *SHAPED],
            "batch": [*SIZES[:-1], *SHAPED],
            "count": [*NUMBERS, INF, *SHAPED],
        }
        | {
            "kind": [127, -1, 0.5],
            "role": ["query", 999],
            "layer": [-2],
            "density": [1.5, NAN],
            "overhead": [1, "no"],
        },
    ),
    "Workload.replace": (
        DENSE.replace,
        {},
        {"m": [2.5, NAN, -1, "8", [8, 8], None], "count": [INF, "1"], "kind": [5]},
    ),
    "Model": (
        partial(replace, MODEL),
        {},
        {
            **dict.fromkeys(("hidden", "vocab", "max_positions"), SIZES),
            "layers": [-1, 2.5, None, 16, [*MODEL.layers], ("attention",)],
            "learned_positions": [-1, "8", True],
            "norm": ["batch"],
            "weight_dtype": ["x", None],
        },
    ),
    "HardwareProfile": (
        partial(replace, HW),
        {},
        {
            "sm_count": SIZES,
            "memory_bytes": [*NUMBERS, INF, 0],
            "bandwidth_bytes_per_s": [NAN, 0, "3.35 TB/s", True],
        },
    ),
}
CASES = [
    (call, name, value)
    for call, (_, _, bad) in CALLS.items()
    for name, values in bad.items()
    for value in values
]


@pytest.mark.parametrize(
    ("call", "name"), list(dict.fromkeys((call, name) for call, name, _ in CASES))
)
def test_what_is_none_of_its_kind_is_refused_in_one_line(call: str, name: str) -> None:
    function, good, bad = CALLS[call]
    for value in bad[name]:
        with pytest.raises(InputError) as error:
            function(**{**good, name: value})
        said, named = str(error.value), {"hw": "hw hardware", "models": "model"}.get(name, name)
        assert "\n" not in said
        words = [named] if named == name else named.split()
        assert any(
            w.removesuffix("_bytes").replace("_", " ").split()[0] in said.replace("_", " ")
            for w in words
        ), said


@pytest.mark.parametrize("call", CALLS)
def test_what_is_right_is_taken(call: str) -> None:
    function, good, _ = CALLS[call]
    function(**good)


@pytest.mark.parametrize(
    "function",
    [
        partial(simulator.predict, MODEL, "depth 0.25", HW),
        partial(simulator.table, [MODEL], [HW], "depth", 0.25),
        partial(simulator.lower, MODEL),
    ],
)
def test_an_unknown_setting_is_named(function: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"^setting 'nosuch' is unknown"):
        function(nosuch=1)


def test_large_shapes_keep_what_single_precision_would_lose() -> None:
    """Large shapes keep alignment and differences from neighbours; times whose cubes overflow stay
    finite."""
    odd, even = simulator.gemm_time(64, [2**24 + 1, 2**24 + 8], 64, HW).seconds
    assert odd > 1.05 * even
    m = 10**9 + np.arange(3) * 256
    assert (np.diff(simulator.gemm_time(m, 4096, 4096, HW).seconds) > 0).all()
    assert (
        np.diff(simulator.gemm_time(64, 2**30 + 1024 * np.arange(3), 4096, HW).seconds) > 0
    ).all()
    long = simulator.gemm_time(
        2**50, 2**31 - 1, 2**31 - 1, simulator.load_hardware("t4"), dtype="fp16"
    )
    assert np.isfinite(long.upper).all()
