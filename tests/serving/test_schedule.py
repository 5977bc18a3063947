"""Laws of the simulated schedule: all requests end, no work is lost, and queues follow Little."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import Request, load_hardware
from simulator.capacity import RESERVE_BYTES
from simulator.errors import InputError
from simulator.serving.arrivals import Lengths, Requests, Traffic
from simulator.serving.schedule import simulate, simulate_replicas
from simulator.serving.served import Served
from simulator.serving.server import Server
from simulator.serving.steps import StepTimes, step_tables

pytestmark = pytest.mark.quick
H100 = load_hardware("h100")
ENGINES = ("vllm", "vllm@v0", "sglang", "trtllm")
LENGTHS = Traffic(Lengths(215, 1.0, 4, 1024), Lengths(200, 0.8), 1000, most_total=2048)


@lru_cache
def times_of(engine: str) -> StepTimes:
    server = Server.of(engine, H100)
    request = Request(model="llama-3.1-8b", engine=engine)
    return step_tables(request, H100, server, 4096, 1000).at()


def held(times: StepTimes) -> float:
    """Bytes of memory without the cache, if the engine may use all memory."""
    return times.cache.weights + times.cache.activations + RESERVE_BYTES


def run(traffic: Traffic, engine: str = "vllm", **settings: object) -> Served:
    server = replace(Server.of(engine, H100), **settings)
    return simulate(traffic.draw(), times_of(engine), server)


def in_order(served: Served) -> bool:
    """Whether every request starts, has its first token, and ends, in this order."""
    ready = served.arrival <= served.start
    return bool((ready & (served.start < served.first) & (served.first <= served.end)).all())


@settings(max_examples=60)
@given(
    engine=st.sampled_from(ENGINES),
    lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 300)), min_size=1, max_size=40),
    spread=st.floats(0.0, 5.0),
    concurrency=st.none() | st.integers(1, 10),
    sequences=st.integers(1, 16),
    budget=st.integers(16, 4096),
    share=st.floats(0.0, 1.0),
    prefix=st.integers(0, 200),
)
def test_all_requests_end_and_every_token_is_computed(
    engine: str,
    lengths: list[tuple[int, int]],
    spread: float,
    concurrency: int | None,
    sequences: int,
    budget: int,
    share: float,
    prefix: int,
) -> None:
    prompt, output = np.array(lengths).T
    arrival = np.linspace(0.0, spread, len(lengths))
    requests = Requests(arrival, prompt, output, prefix, concurrency)
    server = Server.of(engine, H100)
    tokens = budget if server.chunked else max(budget, int(prompt.max()))
    # a cache between that of the longest request, with the shared prefix, and that of all
    times = times_of(engine)
    longest = float((prompt + output).max()) + prefix
    needed = longest + 2 * server.block + share * float((prompt + output).sum())
    cache = replace(times.cache, memory=held(times) + 1.2 * needed * 131072)
    server = replace(server, tokens=tokens, sequences=min(sequences, tokens), memory=1.0)
    served = simulate(requests, replace(times, cache=cache), server)
    assert in_order(served)
    (steps,) = served.steps
    start, seconds, count, decodes, prompts = (
        np.array(column)
        for column in (steps.start, steps.seconds, steps.count, steps.sequences, steps.tokens)
    )
    decoded = int((count * decodes).sum())
    # the first token of a request comes from its prompt, and so can one per preemption
    assert 0 <= int(output.sum()) - len(lengths) - decoded <= served.preemptions
    assert prompts.max() <= tokens or served.preemptions
    assert (decodes <= sequences).all()
    assert (seconds > 0.0).all()
    # steps neither overlap nor stop while a request runs
    gaps = start[1:] - (start + seconds * count)[:-1]
    assert (gaps > -1e-9).all()
    for gap_start, gap in zip((start + seconds * count)[:-1], gaps):
        if gap > 1e-9:
            assert not ((served.start <= gap_start) & (served.end > gap_start + 1e-9)).any()


def number_in_system(served: Served) -> float:
    """Mean number of requests in the system, counted from events."""
    events = np.concatenate([served.arrival, served.end])
    change = np.repeat([1, -1], len(served.arrival))
    order = np.argsort(events, kind="stable")
    present = np.cumsum(change[order])
    return float((present[:-1] * np.diff(events[order])).sum() / served.duration)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("load", [{}, {"rate": 5.0}, {"rate": 30.0}, {"concurrency": 32}])
def test_littles_law_and_work_conservation(engine: str, load: dict[str, float]) -> None:
    served = run(replace(LENGTHS, **load), engine)
    expected = served.requests_per_s * served.latency.mean()
    assert number_in_system(served) == pytest.approx(expected, rel=1e-6)
    assert in_order(served)
    if not load:  # no step waits after the front end has tokenised the requests
        busy = np.dot(served.steps[0].seconds, served.steps[0].count)
        assert served.end.max() - served.start.min() == pytest.approx(busy, rel=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_higher_rate_with_the_same_draws_does_not_shorten_requests(engine: str) -> None:
    latency = [
        run(replace(LENGTHS, rate=rate), engine).latency.mean()
        for rate in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0)
    ]
    for slow, fast in itertools.pairwise(latency):
        assert fast > 0.99 * slow


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_that_decode_add_up_to_the_times_of_requests(engine: str) -> None:
    served = run(replace(LENGTHS, rate=20.0), engine)
    (steps,) = served.steps
    seconds, tokens = np.array(steps.seconds), np.multiply(steps.count, steps.sequences)
    assert tokens.sum() == served.requests.output.sum() - len(served.end)
    # steps of prompts alone delay the others
    spent, whole = np.dot(seconds, tokens), (served.end - served.first).sum()
    mixes = Server.of(engine, H100).mixes
    assert spent == pytest.approx(whole, rel=1e-9) if mixes else spent < whole


def test_a_single_request_takes_its_prompt_and_its_steps() -> None:
    times, front = times_of("vllm"), Server.of("vllm", H100).front
    served = run(Traffic(Lengths(1000), Lengths(101), 1))
    prompt = times.step(1000, 500, 1)
    waited = front.request + 1000 * front.token
    assert served.ttft[0] == pytest.approx(waited + prompt)
    assert served.tpot[0] == pytest.approx(times.decode(1, 1050), rel=0.01)


def test_prompts_are_computed_in_chunks_beside_decodes() -> None:
    traffic = Traffic(Lengths(3000), Lengths(200), 20, rate=20.0)
    mixed, whole = (run(traffic, tokens=tokens) for tokens in (512, 8192))
    (steps,) = mixed.steps
    assert max(np.array(steps.tokens) + np.array(steps.sequences)) == 512
    assert max(steps.seconds) < max(whole.steps[0].seconds)  # all steps decode
    # SGLang computes prompts in steps of their own, which delay the tokens of others
    (alone,) = run(traffic, "sglang").steps
    assert not (np.array(alone.tokens) * np.array(alone.sequences)).any()


def test_a_full_cache_preempts_in_vllm_and_delays_admission_in_trtllm() -> None:
    traffic = Traffic(Lengths(500), Lengths(1000), 200)
    for engine, preempts in (("vllm", True), ("trtllm", False)):
        times = times_of(engine)
        cache = replace(times.cache, memory=held(times) + 20_000 * 131072)
        server = replace(Server.of(engine, H100), memory=1.0)
        served = simulate(traffic.draw(), replace(times, cache=cache), server)
        assert (served.preemptions > 0) == preempts
        assert in_order(served)


def test_a_shared_prefix_is_computed_once() -> None:
    traffic = Traffic(Lengths(2000), Lengths(10), 100, prefix=1600)
    computed = {
        cached: sum(run(traffic, prefix_cache=cached).steps[0].tokens) for cached in (True, False)
    }
    assert computed == {True: 1600 + 100 * 400, False: 100 * 2000}


def test_requests_that_never_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected at most the .* tokens that the cache holds"):
        run(Traffic(Lengths(1000), Lengths(1000), 1), memory=0.2)
    with pytest.raises(InputError, match="a prompt of 9,000 tokens: expected at most the 8,192"):
        run(Traffic(Lengths(9000), Lengths(10), 1), "trtllm")
    # the shared prefix stays in the cache beside a request that is too short to share it
    times, server = times_of("vllm"), replace(Server.of("vllm", H100), memory=1.0)
    tight = replace(times.cache, memory=held(times) + 1650 * 131072)
    requests = Requests(np.array([0.0, 9.0]), np.array([1610, 10]), np.array([1, 100]), 1600)
    with pytest.raises(InputError, match="a request of 1,710 tokens: expected at most the 1,6"):
        simulate(requests, replace(times, cache=tight), server)


def test_a_queue_that_grows_does_not_drain() -> None:
    rates = {rate: run(replace(LENGTHS, rate=rate), sequences=8).drains for rate in (1.0, 30.0)}
    assert rates == {1.0: True, 30.0: False}


def test_replicas_share_the_requests() -> None:
    traffic = replace(LENGTHS, rate=40.0)
    server, times = Server.of("vllm", H100), times_of("vllm")
    one, two = (simulate_replicas(traffic.draw(), times, server, n) for n in (1, 2))
    assert len(two.end) == len(one.end)
    assert two.latency.mean() < one.latency.mean()
    assert len(two.steps) == 2


def test_api_servers_limit_the_rate_of_short_requests() -> None:
    traffic = Traffic(Lengths(100), Lengths(2), 1000)
    one, four = (run(traffic, api_servers=n) for n in (1, 4))
    front = Server.of("vllm", H100).front
    work = 1000 * (front.request + 100 * front.token)
    assert one.start.min() == pytest.approx(work)
    assert four.start.min() == pytest.approx(work / 4)
