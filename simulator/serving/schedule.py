"""Simulate the schedule of one replica: which requests wait, compute their prompt, decode, and are
preempted.

Requests that run decode one token per step. Waiting ones are admitted in order while the engine has
sequences, tokens of the step and blocks of the cache for them. Decode steps between two events (an
arrival, the end of a request, a full cache) are simulated as one run, so the time of a simulation
grows with the requests and not with the steps.

Simplifications: the cache is counted in tokens, with half a block per request that its last block
wastes on average; a preempted request is the one that was admitted last and computes all its tokens
again; the cache keeps no other prefix than the shared one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np

from simulator.engines.engine import Reserve
from simulator.errors import InputError
from simulator.serving.arrivals import Requests
from simulator.serving.served import Served, Steps
from simulator.serving.server import Server
from simulator.serving.steps import StepTimes

MOST_STEPS = 2_000_000
"""Most steps with prompts of a run: they take about half a minute."""

_RETRY = 16
"""Decode steps after which a waiting request is tried again while the reserve falls."""


def simulate(requests: Requests, times: StepTimes, server: Server) -> Served:
    """Return the times of requests in one replica of a server."""
    replica = _Replica(requests, times, server)
    replica.run()
    return replica.served()


def simulate_replicas(
    requests: Requests, times: StepTimes, server: Server, replicas: int
) -> Served:
    """Return the times of requests in equal replicas, to which a router gives them in turn."""
    several = min(replicas, len(requests))
    return Served.joined(
        [simulate(requests.of_replica(i, several), times, server) for i in range(several)]
    )


@dataclass
class _Prompts:
    """Prompt tokens of one step."""

    requests: int = 0
    tokens: int = 0
    pairs: float = 0.0  # sum over tokens of the positions to which they attend
    ends: list[int] = field(default_factory=list)  # requests whose prompt ends

    def add(self, request: int, tokens: int, past: int, ends: bool) -> None:
        self.requests += 1
        self.tokens += tokens
        self.pairs += tokens * (past + 0.5 * tokens)
        if ends:
            self.ends.append(request)


class _Replica:
    """One replica while it runs; all times are s from the first arrival on."""

    def __init__(self, requests: Requests, times: StepTimes, server: Server) -> None:
        self.requests, self.times, self.server = requests, times, server
        # tokens to compute before the next output token; output tokens that lack
        self.prompt: list[int] = requests.prompt.tolist()
        self.left: list[int] = requests.output.tolist()
        self.computed = [0] * len(requests)  # tokens of the prompt
        self.shared = [0] * len(requests)  # tokens of the prompt in the shared prefix
        self.epoch = [0] * len(requests)  # how often it left the cache
        self.joined = [0] * len(requests)  # decode step at which its prompt ended
        self.arrival: list[float] = requests.arrival.tolist()
        self.start, self.first, self.end = ([math.nan] * len(requests) for _ in range(3))
        self.time = self.seen = 0.0  # requests that arrived until ``seen`` are known to the step
        self.arriving: list[tuple[float, int]] = []  # heap of times at which requests are ready
        self.waiting: deque[int] = deque()
        self.partial: int | None = None  # the request whose prompt has been computed in part
        self.ends: list[tuple[int, int, int]] = []  # heap: decode step, request, epoch
        self.order: list[tuple[int, int]] = []  # admissions: request, epoch
        self.decoded = self.since = 0  # decode steps, and those since the last preemption
        self.running = self.context = self.lacking = 0  # decoding: requests, positions, tokens
        self.used, self.prefix, self.preemptions = 0.0, 0, 0
        self.steps = Steps()
        capacity, fixed = self._cache()
        self.capacity, self.each = capacity, fixed + 0.5 * (server.block - 1)
        self.reusable = requests.prefix // server.block * server.block * server.prefix_cache
        self._check()
        self.free = [0.0] * server.api_servers  # heap of times at which API servers are free
        deviation = server.front.log_sd * times.scale * times.errors.passes
        self.slower = math.exp(deviation)
        self.unsent = iter(range(len(requests)))
        self.clients = requests.concurrency or 0  # clients that can send a request
        if not self.clients:
            for time, burst in groupby(self.unsent, lambda i: float(requests.arrival[i])):
                self._send([*burst], time)

    def _cache(self) -> tuple[float, float]:
        prompt, output = self.requests.prompt, self.requests.output
        shortest, longest = float(prompt.min()), float((prompt + output).max())
        return self.times.cache.tokens(self.server, shortest, longest)

    def _check(self) -> None:
        """Refuse requests that the server can never run."""
        prompt, server = self.requests.prompt, self.server
        # the shared prefix stays in the cache beside a prompt that is shorter
        shares = np.minimum(self.reusable, (prompt - 1) // server.block * server.block)
        longest = int((prompt + self.requests.output + self.reusable - shares).max())
        most = max(math.floor(self.capacity - self.each), 0)
        if longest > most:
            raise InputError(
                f"a request of {longest:,} tokens: expected at most the {most:,} tokens that the"
                " cache holds"
            )
        steps = int(prompt.sum()) // server.tokens
        if steps > MOST_STEPS:
            least = -(-int(prompt.sum()) // MOST_STEPS)
            raise InputError(
                f"tokens of a step: expected at least {least:,} for {int(prompt.sum()):,} prompt"
                f" tokens, got {server.tokens:,}"
            )
        if not server.chunked and int(prompt.max()) > server.tokens:
            raise InputError(
                f"a prompt of {int(prompt.max()):,} tokens: expected at most the"
                f" {server.tokens:,} tokens of a step, as {server.engine} computes no chunks"
            )

    def _send(self, burst: Sequence[int], time: float) -> None:
        """Send requests at the same time. They wait for the front end, which tokenises them as a
        batch, so the engine gets them together."""
        front, ready = self.server.front, time
        for request in burst:
            work = self.slower * (front.request + front.token * self.prompt[request])
            free = max(time, heapq.heappop(self.free)) + work
            heapq.heappush(self.free, free)
            ready = max(ready, free)
        for request in burst:
            heapq.heappush(self.arriving, (ready, request))
            self.arrival[request] = time

    def run(self) -> None:
        while True:
            if self.clients:
                self._send([*islice(self.unsent, self.clients)], self.time)
                self.clients = 0
            while self.arriving and self.arriving[0][0] <= self.seen:
                self.waiting.append(heapq.heappop(self.arriving)[1])
            mixes = self.server.mixes
            if mixes:
                self._make_room()
            prompts = self._prompts()
            if prompts.tokens:
                self._step(prompts, self.running if mixes else 0)
            elif self.running:
                self._make_room()
                self._decode()
            elif self.arriving:
                self.time = self.seen = max(self.time, self.arriving[0][0])
            else:
                return

    def _make_room(self) -> None:
        """Preempt requests until each decoding one has a token of the cache. A prompt that is
        computed in part gives the last of its tokens first, and keeps the others (vLLM finds their
        blocks in the prefix cache)."""
        while (lacking := math.ceil(self.used + self.running - self.capacity)) > 0:
            if self.partial is None or not self.computed[self.partial]:
                self._preempt()
                continue
            tokens = min(self.computed[self.partial], lacking)
            self.computed[self.partial] -= tokens
            self.used -= tokens

    def _preempt(self) -> None:
        """Stop the request that was admitted last; it waits before all others."""
        request, epoch = self.order.pop()
        if self.epoch[request] != epoch:  # ended, or preempted before
            return
        self.preemptions += 1
        self.since = 0
        generated = 0
        if request == self.partial:
            self.partial = None
        else:
            generated = self.decoded - self.joined[request]
            self.running -= 1
            self.context -= self.prompt[request] + generated
            self.lacking -= self.left[request] - generated
        self._leave(request, generated)
        self.prompt[request] += generated
        self.left[request] -= generated
        self.waiting.appendleft(request)

    def _leave(self, request: int, generated: int) -> None:
        """Free the cache of a request."""
        own = self.computed[request] + generated - self.shared[request]
        self.used -= own + self.each
        self.epoch[request] += 1

    def _prompts(self) -> _Prompts:
        """Return the prompt tokens of the next step, and admit their requests."""
        server, prompts = self.server, _Prompts()
        beside = self.running if server.mixes else 0
        budget = server.tokens - beside
        room = self.capacity - self.used - beside
        if self.partial is not None:
            rest = self.prompt[self.partial] - self.computed[self.partial]
            tokens = int(min(rest, budget, room))
            if tokens <= 0:
                return prompts
            self._add(prompts, self.partial, tokens)
            room -= tokens
        kept = server.reserve  # tokens of the cache that admission keeps for running requests
        reserve = 0.0 if kept is None else self._share(kept) * self.lacking
        while self.waiting and self.partial is None:
            request = self.waiting[0]
            rest = self.prompt[request] - self._cached(request)
            left = budget - prompts.tokens
            tokens = min(rest, left) if server.chunked else rest
            admits = self.running + prompts.requests < server.sequences
            # without chunks, a preempted request can be longer than a step
            alone = not prompts.requests and rest > server.tokens
            if not admits or left <= 0 or (tokens > left and not alone):
                break
            output = 0
            if server.reserve is not None:
                output = min(self.left[request], server.reserve.most)
            if self.each + output + (rest if output else tokens) + reserve > room:
                break
            self._admit()
            self._add(prompts, request, tokens)
            room -= tokens + self.each
            reserve += output
        return prompts

    def _share(self, reserve: Reserve) -> float:
        fallen = (reserve.first - reserve.least) * self.since / reserve.steps
        return max(reserve.first - fallen, reserve.least)

    def _cached(self, request: int) -> int:
        """Return the tokens of a waiting prompt that the cache holds; one is always computed."""
        block = self.server.block
        return min(self.prefix, (self.prompt[request] - 1) // block * block)

    def _admit(self) -> None:
        request = self.waiting.popleft()
        self.computed[request] = self.shared[request] = self._cached(request)
        self.used += self.each
        self.order.append((request, self.epoch[request]))
        if math.isnan(self.start[request]):
            self.start[request] = self.time

    def _add(self, prompts: _Prompts, request: int, tokens: int) -> None:
        """Add tokens of a prompt to a step."""
        past = self.computed[request]
        self.computed[request] = done = past + tokens
        self.used += tokens
        ends = done == self.prompt[request]
        self.partial = None if ends else request
        prompts.add(request, tokens, past, ends)
        grown = min(self.reusable, done // self.server.block * self.server.block) - self.prefix
        if grown > 0:
            self.prefix += grown
            self.shared[request] += grown

    def _step(self, prompts: _Prompts, sequences: int) -> None:
        """Run a step with prompts, beside which ``sequences`` decode."""
        context = self.context / sequences if sequences else 0.0
        past = prompts.pairs / prompts.tokens
        seconds = self.times.step(prompts.tokens, past, len(prompts.ends), sequences, context)
        self._pass(seconds, 1, sequences, prompts.tokens, (context, past, len(prompts.ends)))
        if sequences:
            self._advance(1)
        for request in prompts.ends:
            self._join(request)

    def _pass(
        self,
        seconds: float,
        steps: int,
        sequences: int,
        tokens: int,
        about: tuple[float, float, int],
    ) -> None:
        self.steps.add(self.time, seconds, steps, sequences, tokens, about)
        self.time += steps * seconds
        self.seen = self.time - seconds if self.server.asynchronous else self.time

    def _join(self, request: int) -> None:
        """Emit the token that follows a prompt; the request decodes the others."""
        if math.isnan(self.first[request]):
            self.first[request] = self.time
        self.left[request] -= 1
        self.joined[request] = self.decoded
        left = self.left[request]
        if not left:
            self._end(request)
            return
        heapq.heappush(self.ends, (self.decoded + left, request, self.epoch[request]))
        self.running += 1
        self.context += self.prompt[request]
        self.lacking += left

    def _end(self, request: int) -> None:
        self.end[request] = self.time
        self._leave(request, self.left[request])
        self.clients += self.requests.concurrency is not None

    def _advance(self, steps: int) -> None:
        """Count decode steps, and end the requests that have all their tokens."""
        tokens = steps * self.running
        self.decoded += steps
        self.since += steps
        self.used += tokens
        self.context += tokens
        self.lacking -= tokens
        while self.ends and self.ends[0][0] <= self.decoded:
            _, request, epoch = heapq.heappop(self.ends)
            if self.epoch[request] == epoch:
                self.running -= 1
                self.context -= self.prompt[request] + self.left[request]
                self._end(request)

    def _decode(self) -> None:
        """Run decode steps until something changes."""
        sequences = self.running
        steps = self._steps_to_end()
        steps = min(steps, int((self.capacity - self.used) // sequences))
        if self.waiting:
            reserve = self.server.reserve
            if reserve is not None and self._share(reserve) > reserve.least:
                steps = min(steps, _RETRY)
        elif self.arriving:
            seconds = self.times.decode(sequences, self.context / sequences)
            wait = math.ceil((self.arriving[0][0] - self.time) / seconds)
            steps = min(steps, max(wait + self.server.asynchronous, 1))
        middle = self.context / sequences + 0.5 * (steps - 1)
        seconds = self.times.decode(sequences, middle)
        self._pass(seconds, steps, sequences, 0, (middle, 0.0, 0))
        self._advance(steps)

    def _steps_to_end(self) -> int:
        while self.epoch[self.ends[0][1]] != self.ends[0][2]:
            heapq.heappop(self.ends)  # preempted
        return self.ends[0][0] - self.decoded

    def served(self) -> Served:
        return Served(
            requests=self.requests,
            arrival=np.array(self.arrival),
            start=np.array(self.start),
            first=np.array(self.first),
            end=np.array(self.end),
            preemptions=self.preemptions,
            steps=(self.steps,),
        )
