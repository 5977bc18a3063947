"""What small functions return, by example: texts of numbers and names, checked arguments, counts of work."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest

from simulator import arguments, codes, display, errors, units
from simulator.arrays import array
from simulator.errors import InputError
from simulator.hardware.link import named
from simulator.operators.attention import attention_pairs
from simulator.operators.base import Link
from simulator.operators.delta_net import delta_state_bytes
from simulator.operators.experts import experts_touched
from simulator.operators.gemm import spmv_bytes
from simulator.workload import Workload, WorkloadBatch

pytestmark = pytest.mark.quick

INF, NAN = float("inf"), float("nan")
DELTA = map(np.array, (32, 16, 128, 128, 4, 4.0, 2.0))
CASES: list[tuple[Any, Any]] = [
    ([units.parse_fraction(text) for text in ("0.25", "12.5%")], [0.25, 0.125]),
    ([units.parse_count(text) for text in ("64", "32k", "1.5k")], [64, 32768, 1536]),
    ([units.parse_parameters(text) for text in ("49B", "350M")], [49e9, 350e6]),
    (units.parse_ratio("1.5x"), 1.5),
    ([units.parse_value(text) for text in ("16", "0.5", "true", "mlp")], [16, 0.5, True, "mlp"]),
    (units.format_quantity(1.23456e9, "Hz", digits=3), "1.23 GHz"),
    ([units.seconds(value) for value in (0.0123456, 3e-6, 41.2)], ["12.3 ms", "3.00 us", "41.2 s"]),
    (units.seconds_between(0.0123456, 0.0101, 0.0142), "12.3 ms (10.1-14.2)"),
    (units.seconds_between(0.0123456, 0.0101, 0.0142, short=True), "12.3 ms (10-15)"),
    (units.seconds_between(0.0073, 0.00629, 0.00891, short=True), "7.3 ms (6.2-9.0)"),
    ([units.size(value) for value in (80 * 2**30, 50 * 2**20, 16.06e9)], ["80.0 GiB", "50.0 MiB", "15.0 GiB"]),
    ([units.parameters(value) for value in (8030261248, 84.96e6)], ["8.03 B", "85.0 M"]),
    ([units.rate(3.35e12, "B/s"), units.rate(989.4e12, "FLOP/s")], ["3.35 TB/s", "989 TFLOP/s"]),
    ([units.ratio(value) for value in (1.234, 12.34, INF)], ["1.23", "12.3", "inf"]),
    ([units.percent(value) for value in (0.25, 0.1234)], ["25 %", "12.3 %"]),
    (units.finite((NAN, 1.5, {"x": (INF,)})), [None, 1.5, {"x": [None]}]),
    (display.as_plain({"file": PurePosixPath("a"), "share": (NAN, 1)}), {"file": "a", "share": [None, 1]}),
    (display.by_column([{"a": 1}, {"a": 2, "b": 3}]), {"a": [1, 2], "b": [None, 3]}),
    ([display.with_and(names) for names in (["a"], ["a", "b", "c"])], ["a", "a, b and c"]),
    ([display.few("abcabc", 2), display.few("ab")], ["a, b and 1 more", "a, b"]),
    (display.markdown_text("<b> a|b *c*"), "&#60;b&#62; a&#124;b &#42;c&#42;"),
    ([errors.one_line("a\tb\u202e"), errors.one_line("x" * 100, 20)], ["a b\\u202e", "xxxxxxxx ... xxxxxxx"]),
    (
        str(errors.unknown("GPU", "h10", ["h100", "a100"])),
        "GPU 'h10' is unknown; did you mean h100 or a100? Known: a100, h100",
    ),
    ([arguments.whole(value) for value in (np.int64(3), 2.5, "8", True)], [3, None, None, None]),
    ([arguments.listed("engine", "vllm"), arguments.listed("batch", (1, 8))], [["vllm"], [1, 8]]),
    ([codes.label_of("bf16", "int4"), codes.label_of("fp8", "fp8_block")], ["int4_wo", "fp8_block"]),
    (codes.formats_of("int4_wo", ["fp32", "fp16"]), ("fp16", "int4")),
    (int(attention_pairs(*map(np.array, (4, 4, 2)))), 7),
    (float(delta_state_bytes(*DELTA)), 2146304.0),
    (experts_touched(np.array([1, 16, 256]), 128, 8).round(1).tolist(), [8.0, 82.4, 128.0]),
    (spmv_bytes(np.array([1.0, 0.5]), 2.0).round(3).tolist(), [2.5, 1.25]),
    (
        named("pcie-host", Link("pcie4", 32e9, 1.6e-6, 8), None, "ada", "l40s").text,
        "pcie4 through host memory (no peer access)",
    ),
]


@pytest.mark.parametrize(("returned", "right"), CASES)
def test_what_is_returned(returned: Any, right: Any) -> None:
    assert returned == right


def test_arguments_are_refused_in_one_line() -> None:
    assert array("m", [1, 2048], arguments.COUNT).tolist() == [1.0, 2048.0]
    with pytest.raises(InputError, match=r"^m: expected whole numbers from 1 up, got 2\.5$"):
        array("m", 2.5, arguments.COUNT)
    with pytest.raises(InputError, match=r"^m, n: expected shapes that broadcast, got \(2,\), \(3,\)$"):
        arguments.together(m=np.zeros(2), n=np.zeros(3))
    with pytest.raises(InputError, match=r"^level: expected a number between 0 and 1, such as 0\.9, got nan$"):
        arguments.number("level", NAN, arguments.LEVEL)


def test_a_batch_of_workloads_has_sums_by_workload() -> None:
    one = Workload.from_rows([{"role": "q", "m": 2, "n": 8, "k": 4}, {"role": "k", "m": 2, "n": 4, "k": 4}])
    batch = WorkloadBatch.of([one, one.take(np.array([0]))])
    assert batch.total(np.array([1.0, 2.0, 5.0])).tolist() == [3.0, 5.0]
