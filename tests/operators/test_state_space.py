"""Recurrences and short convolutions: work and bytes counted by hand."""

from __future__ import annotations

import pytest

from simulator.codes import Kind, Phase
from simulator.models.lower import lower
from simulator.models.model import Layer, Model
from simulator.models.sublayers import (
    DeltaNet,
    LightningAttention,
    Mamba,
    Mamba2,
    ShortConv,
    Sublayer,
)
from simulator.workload import Workload

pytestmark = pytest.mark.quick

HIDDEN = 64
# rows of the recurrence: tokens, sequences, heads, groups, features of a head, of a state, chunk
MAMBA2 = Mamba2(heads=8, channels=16, state=32, groups=2, conv=4, chunk=128)
MAMBA = Mamba(channels=96, state=16, rank=4, conv=4)
LIGHTNING = LightningAttention(heads=4, head_dim=16, chunk=256)


def rows_of(sublayer: Sublayer, kind: Kind, phase: str, batch: int, seq: int) -> Workload:
    model = Model("one", "test", HIDDEN, 100, (Layer((sublayer,)),), 4096)
    w = lower(model, phase=phase, batch=batch, seq=seq, engine="hf")
    return w.take(w.kind == kind)


# flops and bytes of three shapes per operator: a decode step of 3 sequences, prompts of 1 and 2
# sequences of 200 and 50 tokens, in bf16 with states in fp32 (lightning attention: bf16)
CASES: list[tuple[Sublayer, Kind, list[tuple[float, float]]]] = [
    # 4 x 8 x 16 x 32 = 16,384 FLOP per token; 2 x (2 x 128 + 2 x 2 x 32 + 8) = 784 bytes per token;
    # a state of 4,096 x 4 bytes is read and written in a step
    (
        MAMBA2,
        Kind.STATE_SPACE,
        [
            (3 * 16384, 3 * (784 + 2 * 16384)),
            (200 * 16384, 200 * 784 + 16384),
            (100 * 16384, 100 * 784 + 2 * 16384),
        ],
    ),
    # 4 x 96 x 16 = 6,144 FLOP per token; 2 x (3 x 96 + 2 x 16 + 96) = 832 bytes: x, gate and y, B and
    # C, a step size per channel; a state of 1,536 x 4 bytes
    (
        MAMBA,
        Kind.STATE_SPACE,
        [
            (3 * 6144, 3 * (832 + 2 * 6144)),
            (200 * 6144, 200 * 832 + 6144),
            (100 * 6144, 100 * 832 + 2 * 6144),
        ],
    ),
    # 4 x 4 x 16 x 16 = 4,096 FLOP per token; 2 x (2 x 64 + 2 x 64 + 4) = 520 bytes: values, outputs,
    # keys and queries, and a decay per head; a state of 1,024 x 2 bytes
    (
        LIGHTNING,
        Kind.STATE_SPACE,
        [
            (3 * 4096, 3 * (520 + 2 * 2048)),
            (200 * 4096, 200 * 520 + 2048),
            (100 * 4096, 100 * 520 + 2 * 2048),
        ],
    ),
    # 2 x 3 x 64 FLOP per token, 2 x 2 x 64 bytes; two earlier positions of 64 channels
    (
        ShortConv(conv=3),
        Kind.SHORT_CONV,
        [
            (3 * 384, 3 * (256 + 2 * 256)),
            (200 * 384, 200 * 256 + 256),
            (100 * 384, 100 * 256 + 2 * 256),
        ],
    ),
    # Kimi's delta attention: 6 x 2 x 8 x 8 = 768 FLOP per token; 2 x 2 x (2 x 8 + 2 x 8) = 128 bytes of
    # queries to outputs, 4 x 16 of decays; a state of 128 x 4 bytes, three positions of 48 channels
    (
        DeltaNet(heads=2, kv_heads=2, key=8, value=8, conv=4, channel_decay=True, rank=8),
        Kind.DELTA_NET,
        [
            (3 * 768, 3 * (192 + 2 * 800)),
            (200 * 768, 200 * 192 + 800),
            (100 * 768, 100 * 192 + 2 * 800),
        ],
    ),
]


@pytest.mark.parametrize(("sublayer", "kind", "expected"), CASES, ids=lambda x: type(x).__name__)
def test_work_and_bytes_by_hand(
    sublayer: Sublayer, kind: Kind, expected: list[tuple[float, float]]
) -> None:
    requests = [("decode", 3, 500), ("prefill", 1, 200), ("prefill", 2, 50)]
    for request, (flops, moved) in zip(requests, expected, strict=True):
        w = rows_of(sublayer, kind, *request)
        assert (w.flops.sum(), w.bytes.sum()) == (flops, moved)


def test_a_check_of_drafted_tokens_is_a_short_prompt() -> None:
    drafted = lower(
        Model("one", "test", HIDDEN, 100, (Layer((MAMBA2,)),), 4096),
        phase="decode",
        batch=2,
        seq=64,
        positions=3,
    )
    states = drafted.take(drafted.kind == Kind.STATE_SPACE)
    assert (states.m.tolist(), states.phase.tolist()) == ([6], [Phase.DECODE])
    assert states.bytes.sum() == 6 * 784 + 2 * 16384
