"""vLLM as its public interface: the calls of one release, planted times, and planted faults.

Installed by the fixture of ``tests/runners/test_vllm_runner.py`` as the package ``vllm`` of a child
process. It accepts only the parameters that ``tests/runners/vllm_signatures.json`` lists for the
release, and its passes take the time of :func:`pass_s` on a clock of its own. The environment
variable FAKE_VLLM has the release and the fault.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FILE = Path(__file__).parents[1] / "runners" / "vllm_signatures.json"
PLAN: dict[str, str] = json.loads(os.environ.get("FAKE_VLLM", "{}"))
__version__ = PLAN.get("release", "0.33.0")
FAULT = PLAN.get("fault", "")
KNOWN = json.loads(FILE.read_text(encoding="utf-8")).get(PLAN.get("interface", __version__), {})
CLOCK = [100.0]

if PLAN:
    time.perf_counter = lambda: CLOCK[0]


def pass_s(config: dict[str, Any], tokens: int) -> float:
    """Planted time of a pass: by the weights of the layers, the tokens, and per layer."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    attention = hidden * width * (2 * heads + 2 * config.get("num_key_value_heads", heads))
    inner = (
        config.get("moe_intermediate_size", 0) * config.get("num_experts", 0)
        or config["intermediate_size"]
    )
    slower = float(PLAN.get("slower", 1.0))
    return slower * layers * (1e-5 + 1e-12 * max(tokens, 8) * (attention + 3 * hidden * inner))


def _checked(what: str, given: dict[str, Any]) -> None:
    names = set(KNOWN["parameters"][what].split())
    if what == "LLM":
        names |= set(KNOWN["parameters"]["EngineArgs"].split())
    if FAULT == "argument":
        names.discard("kv_cache_memory_bytes")
    for name in given:
        if name not in names:
            raise TypeError(f"{what}.__init__() got an unexpected keyword argument '{name}'")


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams(SimpleNamespace):
    def __init__(self, **given: Any) -> None:
        _checked("SamplingParams", given)
        super().__init__(**given)
        if not (self.ignore_eos and not self.detokenize and self.temperature == 0.0):
            raise ValueError("a sequence could end early, or needs a tokenizer")


class TokensPrompt(dict[str, Any]):
    def __init__(self, **given: Any) -> None:
        _checked("TokensPrompt", given)
        super().__init__(**given)


def _output(request_id: str, tokens: int, finished: bool) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=request_id,
        finished=finished,
        outputs=[SimpleNamespace(token_ids=list(range(tokens)))],
    )


def _fail() -> None:
    if FAULT == "crash":
        print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
        os._exit(3)
    if FAULT == "hang":
        time.sleep(600)


class LLMEngine:
    def __init__(self, llm: LLM) -> None:
        self.llm, self.left, self.new = llm, dict[str, int](), list[int]()

    def add_request(self, request_id: str, prompt: TokensPrompt, params: SamplingParams) -> str:
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {type(request_id)}")
        if params.output_kind is not RequestOutputKind.DELTA:
            raise ValueError("every step would return all tokens so far")
        self.llm.check(prompt, params)
        self.left[request_id] = params.max_tokens - (FAULT == "short")
        self.new.append(len(prompt["prompt_token_ids"]))
        if len(self.left) > self.llm.max_num_seqs:
            raise ValueError("more requests in flight than max_num_seqs")
        return request_id

    def step(self) -> list[SimpleNamespace]:
        """Prefill new requests one by one, then give every request a token."""
        _fail()
        CLOCK[0] += sum(pass_s(self.llm.config, tokens) for tokens in self.new)
        CLOCK[0] += pass_s(self.llm.config, len(self.left))
        self.new.clear()
        self.left = {name: left - 1 for name, left in self.left.items()}
        out = [_output(name, 1, left == 0) for name, left in self.left.items()]
        self.left = {name: left for name, left in self.left.items() if left}
        return out

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            del self.left[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)


KERNELS = {"gemm": 0.6, "attention": 0.2}  # shares of a pass in the profile; the rest is the host's


def _event(name: str, kind: str, start_us: float, seconds: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": kind, "ts": start_us, "dur": 1e6 * seconds, "tid": 1}


class LLM:
    def __init__(self, model: str, **given: Any) -> None:
        _checked("LLM", given)
        self.config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        (architecture,) = self.config["architectures"]
        if architecture not in KNOWN["architectures"].split():
            raise ValueError(f"Model architectures ['{architecture}'] are not supported for now.")
        if (given["load_format"], given["skip_tokenizer_init"], given["enable_prefix_caching"]) != (
            "dummy",
            True,
            False,
        ):
            raise OSError(f"no weights and no tokenizer in {model}")
        self.max_num_seqs, self.max_model_len = given["max_num_seqs"], given["max_model_len"]
        heads = self.config.get("num_key_value_heads", self.config["num_attention_heads"])
        width = (
            self.config.get("head_dim")
            or self.config["hidden_size"] // self.config["num_attention_heads"]
        )
        size = {"bfloat16": 2, "float16": 2, "float32": 4}[given["dtype"]]
        each = 2 * self.config["num_hidden_layers"] * heads * width * size
        if given["kv_cache_memory_bytes"] < each * self.max_num_seqs * self.max_model_len:
            raise ValueError("the cache does not hold all sequences: some would wait")
        if given["max_num_batched_tokens"] < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be greater than or equal to max_num_seqs")
        print("INFO 11-28 12:00:00 [llm.py:1] planted vLLM; WARNING: ValueError: of no importance")
        if FAULT == "memory":
            print(
                "(EngineCore pid=7) ERROR 11-28 [core.py:9] torch.OutOfMemoryError: CUDA out of"
                " memory. Tried 2 GiB"
            )
            raise RuntimeError(
                "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
            )
        self.llm_engine, self.trace = LLMEngine(self), dict(given.get("profiler_config", {}))
        self.events: list[dict[str, Any]] | None = None

    def start_profile(self) -> None:
        self.events = []

    def stop_profile(self) -> None:
        text = json.dumps({"traceEvents": self.events}).encode()
        (Path(self.trace["torch_profiler_dir"]) / "rank0.pt.trace.json.gz").write_bytes(
            gzip.compress(text)
        )
        self.events = None

    def _pass(self, prompts: int, tokens: int, decodes: int) -> None:
        """Take the time of a pass, which the profiler shows as a step with kernels."""
        seconds, start = pass_s(self.config, tokens + decodes), 1e6 * CLOCK[0]
        CLOCK[0] += seconds
        if self.events is None:
            return
        step = f"execute_context_{prompts}({tokens})_generation_{decodes}({decodes})"
        self.events.append(_event(step, "user_annotation", start, seconds))
        outer = _event(
            "vllm::unified_attention_with_output", "cpu_op", start, KERNELS["attention"] * seconds
        )
        self.events += [outer, {**outer, "name": "_C::cpu_attention_with_kv_cache"}]
        start += outer["dur"]
        self.events.append(_event("_C::onednn_mm", "cpu_op", start, KERNELS["gemm"] * seconds))

    def check(self, prompt: TokensPrompt, params: SamplingParams) -> None:
        ids = prompt["prompt_token_ids"]
        if max(ids) >= self.config["vocab_size"]:
            raise ValueError(f"Token id {max(ids)} is out of vocabulary")
        if len(ids) + params.max_tokens > self.max_model_len:
            raise ValueError(f"the request is longer than max_model_len {self.max_model_len}")

    def generate(
        self, prompts: list[TokensPrompt], sampling_params: SamplingParams, *, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        _fail()
        output = sampling_params.max_tokens - (FAULT == "short")
        for prompt in prompts:
            self.check(prompt, sampling_params)
        self._pass(len(prompts), len(prompts) * len(prompts[0]["prompt_token_ids"]), 0)
        for _ in range(output - 1):
            self._pass(0, 0, len(prompts))
        return [_output(str(i), output, True) for i in range(len(prompts))]
