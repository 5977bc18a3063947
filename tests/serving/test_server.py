"""Settings of servers, from engine files and from options as users type them."""

from __future__ import annotations

import pytest
from tables import tables_of

from simulator import load_hardware
from simulator.errors import InputError
from simulator.serving.server import Server

pytestmark = pytest.mark.quick
H100 = load_hardware("h100")


def test_engines_fill_their_steps_as_their_files_state() -> None:
    vllm, sglang, trtllm = (Server.of(name, H100) for name in ("vllm", "sglang", "trtllm"))
    assert (vllm.mixes, sglang.mixes, trtllm.mixes) == (True, False, True)
    assert (vllm.chunked, sglang.chunked, trtllm.chunked) == (True, True, False)
    assert vllm.reserve is None
    assert sglang.reserve is not None
    assert sglang.reserve.first == 0.7
    assert trtllm.reserve is not None
    assert trtllm.reserve.least == 1.0
    assert Server.of("vllm@0.11", H100).asynchronous is False
    assert vllm.asynchronous is True


def test_options_are_those_that_users_type() -> None:
    server = Server.of("vllm", H100, "--max_num_seqs=64 --max-num-batched-tokens 4k")
    assert (server.sequences, server.tokens) == (64, 4096)
    assert not Server.of("vllm", H100, ["--no-enable-prefix-caching"]).prefix_cache
    assert Server.of("trtllm", H100, "--enable_chunked_prefill --max_num_tokens 512").chunked
    careful = Server.of("sglang", H100, "--schedule-conservativeness 2 --enable-mixed-chunk")
    assert careful.mixes
    assert careful.reserve is not None
    assert careful.reserve.first == 1.0
    assert careful.reserve.least == pytest.approx(0.14)


def test_a_small_token_budget_limits_the_sequences() -> None:
    assert Server.of("vllm", H100, "--max-num-batched-tokens 2").sequences == 2
    with pytest.raises(InputError, match="--max-num-seqs: expected at most the 2 tokens of a step"):
        Server.of("vllm", H100, "--max-num-batched-tokens 2 --max-num-seqs 3")


@pytest.mark.parametrize(
    ("engine", "options", "reason"), tables_of("serving/mistakes.yaml")["options"]
)
def test_unknown_options_are_refused(engine: str, options: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Server.of(engine, H100, options)
