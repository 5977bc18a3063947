"""Run one model in vLLM and time its requests: the program of a child process, which needs only
vLLM.

    python worker.py DESCRIPTOR '{"model": "FOLDER", "load_format": "dummy", ...}'

The settings are keyword arguments of ``vllm.LLM``. Each line of the standard input is a request,
and each line written to the file descriptor an answer, in JSON; vLLM writes to the standard output.
The process ends with its input.
"""

from __future__ import annotations

import ctypes
import gzip
import importlib
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
PR_SET_PDEATHSIG = 1  # in linux/prctl.h
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of torch's trace


def prompts(vllm: Any, batch: int, tokens: int, vocab: int) -> list[Any]:
    choose = random.Random(0)
    return [
        vllm.TokensPrompt(prompt_token_ids=choose.choices(range(vocab), k=tokens))
        for _ in range(batch)
    ]


def by_step(vllm: Any, output: int) -> Any:
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
    return vllm.SamplingParams(
        temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False, output_kind=delta
    )


def latency(vllm: Any, llm: Any, *, batch: int, tokens: int, output: int, vocab: int) -> Answer:
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
    )
    sent = prompts(vllm, batch, tokens, vocab)
    start = time.perf_counter()
    finished = llm.generate(sent, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    made = {len(one.outputs[0].token_ids) for one in finished}
    if len(finished) != batch or made != {output}:
        raise RuntimeError(
            f"expected {batch} requests with {output} new tokens each, got {len(finished)} with"
            f" {made}"
        )
    return {"seconds": seconds}


def serve(
    vllm: Any, llm: Any, *, concurrency: int, tokens: int, output: int, vocab: int, windows: int
) -> Answer:
    """Return times of windows in the steady state of a closed loop, and waits for first tokens.

    ``concurrency`` requests are in flight; a finished request is replaced at once. The first
    requests ask for fewer tokens, so requests finish at equal distances. The ramp-up ends when
    ``concurrency`` requests have finished. A window is the time in which ``concurrency`` requests
    finish: the time of one request.
    """
    engine = llm.llm_engine
    sent = prompts(vllm, concurrency, tokens, vocab)
    begun = dict[str, float]()
    done = 0
    marks = list[float]()
    waits = list[float]()

    def add(number: int, length: int) -> None:
        begun[str(number)] = time.perf_counter()
        engine.add_request(str(number), sent[number % concurrency], by_step(vllm, length))

    for number in range(concurrency):
        add(number, -(-(number + 1) * output // concurrency))
    waiting = set(begun)
    in_flight = set(begun)
    number = concurrency
    while len(marks) <= windows:
        for one in engine.step():
            if one.request_id in waiting:
                waiting.discard(one.request_id)
                if marks:
                    waits.append(time.perf_counter() - begun[one.request_id])
            if one.finished:
                in_flight.discard(one.request_id)
                done += 1
                if done % concurrency == 0:
                    marks.append(time.perf_counter())
                add(number, output)
                waiting.add(str(number))
                in_flight.add(str(number))
                number += 1
    engine.abort_request(sorted(in_flight))
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "seconds": [late - early for early, late in itertools.pairwise(marks)],
        "first_token_s": waits,
    }


def decode(vllm: Any, llm: Any, *, batch: int, tokens: int, output: int, vocab: int) -> Answer:
    """Return the mean time of the steps in which all sequences decode, without the first and the
    last step. The engine may begin with the first prompt alone, so there are a few steps less."""
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts(vllm, batch, tokens, vocab)):
        engine.add_request(str(number), prompt, by_step(vllm, output))
    at = list[float]()
    begun = set[str]()
    made = 0
    ended = False
    while engine.has_unfinished_requests():
        found = engine.step()
        begun |= {one.request_id for one in found if one.outputs[0].token_ids}
        made += sum(len(one.outputs[0].token_ids) for one in found)
        ended |= any(one.finished for one in found)
        if len(begun) == batch and not ended:
            at.append(time.perf_counter())
    if made != batch * output or len(at) < 2:
        raise RuntimeError(
            f"expected {batch} requests that decode together, with {output} new tokens each, got"
            f" {made} tokens in {len(at)} common steps"
        )
    return {"seconds": (at[-1] - at[0]) / (len(at) - 1)}


def profile(vllm: Any, llm: Any, *, folder: str, **request: int) -> Answer:
    """Return the kernels of each step of a batch: its name with its numbers of prompts and decodes,
    its time, and the time of each kernel, s; vLLM must have been started with its torch profiler,
    which writes into ``folder``."""
    for old in Path(folder).glob("*"):
        old.unlink()
    llm.start_profile()
    latency(vllm, llm, **request)
    llm.stop_profile()
    texts = [gzip.decompress(file.read_bytes()) for file in sorted(Path(folder).glob("*.json.gz"))]
    events = [
        event
        for text in texts
        for event in json.loads(text)["traceEvents"]
        if event.get("ph") == "X"
    ]
    return {"steps": steps_of(events)}


def steps_of(events: list[dict[str, Any]]) -> list[Answer]:
    """Return the steps of a trace. Times of kernels are those of a GPU if there are any, else those
    of the operators of torch, without the operators that they call."""
    gpu = [event for event in events if event.get("cat") in ON_GPU]
    spans = [
        e
        for e in events
        if e["name"].startswith("execute_") and (e.get("cat", "").startswith("gpu") == bool(gpu))
    ]
    inside = gpu or [event for event in events if event.get("cat") == "cpu_op"]
    out = []
    for span in sorted(spans, key=lambda e: float(e["ts"])):
        start = float(span["ts"])
        end = float(span["ts"]) + float(span["dur"])
        own = [
            e for e in inside if start <= float(e["ts"]) < end and (gpu or e["tid"] == span["tid"])
        ]
        kernels = dict[str, float]()
        open_until = list[tuple[float, str]]()
        for e in sorted(own, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            while open_until and open_until[-1][0] <= float(e["ts"]):
                open_until.pop()
            if open_until and not gpu:
                kernels[open_until[-1][1]] -= 1e-6 * float(e["dur"])
            kernels[e["name"]] = kernels.get(e["name"], 0.0) + 1e-6 * float(e["dur"])
            open_until.append((float(e["ts"]) + float(e["dur"]), e["name"]))
        out.append({"name": span["name"], "seconds": 1e-6 * float(span["dur"]), "kernels": kernels})
    return out


TIMED: dict[str, Callable[..., Answer]] = {
    "decode": decode,
    "latency": latency,
    "profile": profile,
    "serve": serve,
}


def main(descriptor: int, settings: Answer) -> None:
    """Start the model, then answer requests until the input ends; an error is answered and ends the
    process."""
    # the reader must see the end of this process, not of vLLM's processes
    os.set_inheritable(descriptor, False)
    # a killed reader leaves this process stopped: it continues and sees its input's end
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    with os.fdopen(descriptor, "w", buffering=1) as answers:

        def answer(**found: Any) -> None:
            answers.write(json.dumps(found) + "\n")

        try:
            vllm = importlib.import_module("vllm")
            versions = {
                name: importlib.import_module(name).__version__ for name in ("vllm", "torch")
            }
            llm = vllm.LLM(**settings)
            answer(versions=versions)
            for line in sys.stdin:
                request = json.loads(line)
                answer(**TIMED[request.pop("what")](vllm, llm, **request))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":  # vLLM starts further processes, which import this module
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
