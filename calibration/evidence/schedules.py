"""Published runs of servers next to simulated schedules: requests that are sent at once
(``vllm bench serve``), and servers whose queue is never empty (ML.ENERGY)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from calibration.evidence.measurements import published
from calibration.validation.scoring import Comparison, percent, score_of, table
from simulator.arrays import FloatArray
from simulator.hardware.library import load_hardware
from simulator.prediction.requests import by_key
from simulator.request import MAX_TOKENS, Request
from simulator.serving.arrivals import Lengths, Requests, Traffic
from simulator.serving.schedule import simulate
from simulator.serving.served import Served, weighted_quantile
from simulator.serving.server import Server
from simulator.serving.steps import TYPICAL, Errors, StepTables, step_tables

Row = Mapping[str, str]
Quantities = Mapping[str, float]

PROMPT_LOG_SD, OUTPUT_LOG_SD = 1.0, 0.7
"""Standard deviations of the logs of ShareGPT's lengths, chosen on the runs of an A100."""
MOST_PROMPT, MOST_TOTAL, FEWEST = 1024, 2048, 4
"""Range of the tokens of ShareGPT's requests (vLLM, vllm/benchmarks/datasets.py)."""
PROMPTS: Mapping[str, int] = {"lm-arena-chat": 250, "gpqa": 300, "sourcegraph-fim": 1900}
"""Assumed mean tokens of ML.ENERGY's prompts, whose lengths are not published. Prompts of chat and
code explain the difference between mean and median times of a step on the H100."""
ROUNDS = 4  # requests per sequence of a steady state; the first and the last round do not count
ENDS = tuple(
    Errors(**{name: side}) for name in ("kernels", "passes", "work") for side in (1.0, -1.0)
)
"""Ends of the errors of kernels, and of the host per pass and per sequence."""
WORST = 10
QUANTITIES: Mapping[str, str] = {
    "tokens_per_s": "tokens/s",
    "ttft_s": "first token",
    "tpot_s": "per token",
}


@dataclass(frozen=True)
class Scenario:
    """A model on a server, and the requests that it runs."""

    request: Request
    hardware: str
    server: Server
    requests: Requests

    @property
    def tables(self) -> StepTables:
        longest = int((self.requests.prompt + self.requests.output).max())
        # powers of two, so that runs share tables
        sizes = [
            2 ** math.ceil(math.log2(size)) for size in (longest, max(len(self.requests), 1024))
        ]
        return _tables(self.request, self.hardware, self.server, *sizes)

    def run(self, errors: Errors = TYPICAL) -> Served:
        return simulate(self.requests, self.tables.at(0, errors), self.server)


@lru_cache(maxsize=16)
def _tables(
    request: Request, hardware: str, server: Server, longest: int, requests: int
) -> StepTables:
    return step_tables(request, load_hardware(hardware), server, longest, requests)


def request_of(row: Row, engine: str) -> Request:
    """Return the model and the number formats of a run. A GPU without fp8 arithmetic computes in 16
    bits with narrow weights."""
    weight = row.get("weight_dtype", "bf16")
    return Request(
        model=row["model"],
        engine=engine,
        devices=int(row["devices"]),
        parallel=row["parallel"] or "tensor",
        dtype="fp8" if weight == "fp8_block" else "bf16",
        weight_dtype=weight,
        kv_dtype="bf16",
    )


def at_once(row: Row) -> Scenario:
    prompt, output = (Lengths(float(row[name])) for name in ("seq", "new_tokens"))
    most = MAX_TOKENS
    if row["lengths"] == "sharegpt":
        prompt = Lengths(prompt.mean, PROMPT_LOG_SD, FEWEST, MOST_PROMPT)
        output, most = Lengths(output.mean, OUTPUT_LOG_SD, FEWEST, MOST_TOTAL), MOST_TOTAL
    clients = int(row["concurrency"]) if row["concurrency"] else None
    traffic = Traffic(prompt, output, int(row["requests"]), concurrency=clients, most_total=most)
    engine, options = row["engine"], row["options"]
    if engine == "vllm" and row["version"]:
        # with this option, the host is that of the releases that have it by default
        engine = "vllm@async" if "--async-scheduling" in options else f"vllm@{row['version']}"
    server = Server.of(engine, load_hardware(row["hardware"]), options)
    return Scenario(request_of(row, engine), row["hardware"], server, traffic.draw())


def steady(row: Row, prompts: float = 1.0) -> Scenario:
    """Return a server that runs the average number of sequences of a run all the time, with
    sampled requests; ``prompts`` scales the assumed lengths."""
    sequences = round(float(row["batch"]))
    prompt = Lengths(prompts * PROMPTS[row["task"]], PROMPT_LOG_SD, FEWEST)
    output = Lengths(float(row["new_tokens"]), OUTPUT_LOG_SD, FEWEST)
    requests = Traffic(prompt, output, ROUNDS * sequences).draw()
    options = f"--max-num-seqs {sequences} --max-num-batched-tokens 8192 --api-server-count 3"
    server = Server.of("vllm@async", load_hardware(row["hardware"]), options, sampled=True)
    return Scenario(request_of(row, "vllm@async"), row["hardware"], server, requests)


def compare_at_once(left_out: bool = False) -> list[Comparison]:
    """Return tokens/s, and medians of the time to the first token and per further token, s, of
    requests that are sent at once. Equal commands are one case, whose median counts.
    ``left_out``: the runs that no score counts."""
    rows = [row for row in published("at_once") if bool(row["left_out"]) == left_out]
    return [c for case in cases(rows) for c in _compare(case, at_once(case[0]), _at_once)]


def compare_steady() -> list[Comparison]:
    """Return median times between tokens, s, of servers whose queue is never empty."""
    return [c for row in published("steady") for c in _compare([row], steady(row), _steady)]


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Return runs of equal commands and lengths together."""

    key = itemgetter("engine", "model", "hardware", "weight_dtype", "command", "requests", "seq")
    return list(by_key(sorted(rows, key=key), key).values())


def _at_once(run: Served) -> Quantities:
    values = run.tokens_per_s, float(np.median(run.ttft)), float(np.nanmedian(run.tpot))
    return dict(zip(QUANTITIES, values, strict=True))


def _steady(run: Served) -> Quantities:
    """Return the median time between tokens while all sequences run and requests wait."""
    seconds, _, tokens = _while_full(run)
    return {"between_tokens_s": weighted_quantile(seconds, tokens, 0.5)}


def tokens_per_s(run: Served) -> float:
    """Return the output tokens/s while all sequences run and requests wait."""
    seconds, count, tokens = _while_full(run)
    return float(tokens.sum() / np.dot(seconds, count))


def _while_full(run: Served) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return times, numbers and decoded tokens of the steps in which all sequences run and requests
    wait."""
    first, steps = np.sort(run.first), run.steps[0]
    sequences = len(first) // ROUNDS
    start, seconds, count, decodes = (
        np.array(column) for column in (steps.start, steps.seconds, steps.count, steps.sequences)
    )
    inside = (start >= first[sequences]) & (start <= first[-sequences])
    return seconds[inside], count[inside], (decodes * count)[inside]


def interval(value: ArrayLike, ends: ArrayLike, further: ArrayLike = 0.0) -> FloatArray:
    """Return the lower and upper end of a value that combine the ends of its errors, and a
    ``further`` error, as a root of sum of squares of logs."""
    logs = np.log(np.asarray(ends) / value)
    squares = (np.square(np.maximum(side * logs, 0)).sum(axis=0) for side in (-1, 1))
    below, above = (np.exp(np.sqrt(one + np.square(further))) for one in squares)
    return np.array([value / below, value * above])


def _compare(
    case: Sequence[Row], scenario: Scenario, quantities: Callable[[Served], Quantities]
) -> list[Comparison]:
    """Return the comparisons of a case."""
    row = case[0]
    typical, *ends = (quantities(scenario.run(errors)) for errors in (TYPICAL, *ENDS))
    lengths = f"{row.get('task') or row.get('lengths')} {row.get('batch') or row.get('seq')}"
    out = []
    for name, value in typical.items():
        lower, upper = interval(value, [end[name] for end in ends])
        out.append(
            Comparison(
                what=f"{row['model']} {row.get('weight_dtype', '')}".rstrip(),
                where=", ".join(filter(None, [lengths, row.get("command"), row["parallel"]])),
                measured=float(np.median([float(one[name] or "nan") for one in case])),
                predicted=value,
                lower=float(lower),
                upper=float(upper),
                source=name,
                reason=row.get("left_out") or row.get("reason", ""),
                engine=row.get("engine", "vllm"),
                gpu=row["hardware"],
            )
        )
    return out


def schedule_tables() -> list[str]:
    """Return the tables of ``docs/generated/serving.md`` in their order."""
    counted, excluded = compare_at_once(), compare_at_once(True)
    names = [(), ("engine",), ("engine", "gpu"), ("gpu",)]
    lines = [line for name in names for line in _at_once_lines(counted, name)]
    worst = sorted(counted, key=lambda c: abs(np.log(c.predicted / c.measured)))
    cells = [
        [
            *(c.engine, c.gpu, c.what, c.where, QUANTITIES[c.source]),
            f"{c.predicted / c.measured:.2f}",
            c.reason or "not known",
        ]
        for c in {(c.engine, c.gpu, c.what, c.where): c for c in worst}.values()
    ]
    apart = [
        [reason, *line]
        for reason, some in by_key(excluded, lambda c: c.reason).items()
        for line in _at_once_lines(some, ("engine",))
    ]
    headers = [f"{text}: {part}" for text in QUANTITIES.values() for part in ("error", "inside")]
    where = ["engine", "GPU", "model", "requests", "what", "predicted / measured", "cause"]
    return [
        table(["rows", "cases", *headers], lines),
        table(where, cells[::-1][:WORST], (0, 1, 2, 3, 4, 6)),
        table(["why", "engine", "cases", *headers], apart, left=(0, 1)),
        _steady_table(compare_steady()),
    ]


def _at_once_lines(rows: Sequence[Comparison], names: Sequence[str]) -> list[list[str]]:
    """Return a line per group: its cases, median errors and coverage of each quantity."""
    groups = by_key(rows, lambda c: ", ".join(getattr(c, name) for name in names) or "all")
    out = []
    for name, some in groups.items():
        scores = [score_of([c for c in some if c.source == quantity]) for quantity in QUANTITIES]
        cells = [
            percent(s[key] + 0 * s["median"]) for s in scores for key in ("median", "coverage")
        ]
        out.append([name, str(len(some) // len(QUANTITIES)), *cells])
    return out


def _steady_table(rows: Sequence[Comparison]) -> str:
    runs = published("steady")
    doubled = [_steady(steady(row, 2.0).run())["between_tokens_s"] for row in runs]
    pairs: list[tuple[Any, ...]] = [
        ((c.gpu, row["parallel"] or "one or tensor", task), c, replace(c, predicted=value))
        for c, row, value in zip(rows, runs, doubled, strict=True)
        for task in ("all", row["task"])
    ]
    cells = []
    for key, members in sorted(by_key(pairs, itemgetter(0)).items()):
        s, twice = (score_of([member[i] for member in members]) for i in (1, 2))
        errors = [s["median"], s["median bias"], s["coverage"], twice["median"]]
        cells.append([*key, str(len(members)), *map(percent, errors)])
    header = ["GPU", "parallel", "task", "runs", "error", "bias", "inside"]
    return table([*header, "error, prompts doubled"], cells, left=(0, 1, 2))
