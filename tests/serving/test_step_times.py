"""Times of steps: those of the cost model at single passes, and mixed steps."""

from __future__ import annotations

from functools import lru_cache

import pytest

from simulator import Request, load_hardware, lower, workload_time
from simulator.power import PARTS
from simulator.serving.server import Server
from simulator.serving.steps import Errors, StepTables, step_tables

pytestmark = pytest.mark.quick
H100 = load_hardware("h100")


@lru_cache
def tables(model: str = "llama-3.1-8b") -> StepTables:
    server = Server.of("vllm", H100, "--max-num-seqs 256")
    return step_tables(Request(model=model, engine="vllm"), H100, server, 4096, 1000)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-20b", "qwen3-next-80b-a3b"])
@pytest.mark.parametrize(("sequences", "context"), [(1, 100), (16, 2000), (100, 1000), (200, 4000)])
def test_decode_steps_are_those_of_the_cost_model(model: str, sequences: int, context: int) -> None:
    w = lower(model, phase="decode", batch=sequences, seq=context, engine="vllm")
    expected = workload_time(w, H100).total_s
    assert tables(model).at().decode(sequences, context) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-20b", "qwen3-next-80b-a3b"])
@pytest.mark.parametrize(("tokens", "past"), [(100, 0), (1000, 0), (4000, 0), (512, 2000)])
def test_prompts_are_those_of_the_cost_model(model: str, tokens: int, past: int) -> None:
    w = lower(model, phase="prefill", seq=tokens + past, cached_prefix=past, engine="vllm")
    found = tables(model).at().step(tokens, past + tokens / 2, 1)
    assert found == pytest.approx(workload_time(w, H100).total_s, rel=0.06)


def test_a_mixed_step_reads_the_weights_once() -> None:
    times = tables().at()
    prompt, decode = times.step(256, 128, 1), times.decode(64, 1000)
    mixed = times.step(256, 128, 1, 64, 1000)
    assert max(prompt, decode) < mixed < 0.75 * (prompt + decode)


def test_a_mixed_step_takes_the_energy_of_the_weights_once() -> None:
    watts = tables().power.watts
    work = tables().work(watts).at()
    apart = work.step(256, 128, 1) + work.decode(64, 1000)
    weights_s = 15.0e9 / H100.bandwidth_bytes_per_s  # time to read 7.5 billion parameters
    saved = apart - work.step(256, 128, 1, 64, 1000)
    assert saved == pytest.approx(watts[PARTS.index("memory")] * weights_s, rel=0.15)


def test_errors_scale_the_steps_that_they_concern() -> None:
    typical = tables().at()
    kernels, passes, work = (
        tables().at(errors=errors)
        for errors in (Errors(kernels=1.0), Errors(passes=1.0), Errors(work=1.0))
    )
    few, many = (1, 100), (256, 100)
    assert kernels.decode(*few) > typical.decode(*few)
    assert kernels.step(4096, 2048, 1) > typical.step(4096, 2048, 1)
    # the time per sequence counts in a step of many, the time per pass in a short step too
    gain = {
        name: [slow.decode(*at) / typical.decode(*at) - 1.0 for at in (few, many)]
        for name, slow in (("passes", passes), ("work", work))
    }
    assert min(*gain["passes"], *gain["work"]) > 0.0
    assert gain["work"][1] / gain["work"][0] > 3.0 * gain["passes"][1] / gain["passes"][0]
