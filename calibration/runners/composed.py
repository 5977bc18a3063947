"""How far what the decoder puts together of several kernels lies from what its bytes and launches say.

``python -m calibration.runners.composed PROFILE.yaml`` times scoring, selecting, gathering and attention by blocks as
:mod:`calibration.runners.decoder.routed` runs them, alone and on one thread, for three models, beside the profile of
such a CPU; the root mean square of the log of their ratio is ``composed_log_sd`` of ``executed.yaml``. It counts the
time of the thread, so that others on the machine do not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from calibration.runners.cases import settings_of
from calibration.runners.compare import EXECUTED
from calibration.runners.decoder.routed import BlockAttention, CacheCut, TokenRouting, block_means, routed_attention
from calibration.runners.decoder.run import Cache
from simulator.cost.forward import forward_passes
from simulator.hardware.library import load_hardware
from simulator.hardware.profile import HardwareProfile
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.scenario import Scenario
from simulator.workload_batch import WorkloadBatch

SETTINGS = (("smollm2-135m", 256), ("llama-3.2-1b", 512), ("qwen2.5-0.5b", 128), ("qwen2.5-0.5b", 1024))
_ROUNDS, _WINDOW_S = 9, 0.02


def seconds_of(run: Callable[[], Any]) -> float:
    """Median time of a call, s."""
    run(), run()
    start = time.thread_time()
    run()
    loops, found = max(1, int(_WINDOW_S / max(time.thread_time() - start, 1e-6))), []
    for _ in range(_ROUNDS):
        start = time.thread_time()
        for _ in range(loops):
            run()
        found.append((time.thread_time() - start) / loops)
    return float(np.median(found))


def measured(config: ModelConfig, seq: int, sparsity: float) -> Iterator[tuple[str, str, float]]:
    """Family, phase, and the time that it adds to a layer, s; where it has an attention of its own, with that."""
    heads, kv, d, hidden = config.heads, config.kv_heads, config.head_dim, config.hidden
    x, one, router = torch.randn(1, seq, hidden), torch.randn(1, 1, hidden), torch.randn(2, hidden)
    q, k, v = (torch.randn(1, seq, h, d).transpose(1, 2) for h in (heads, kv, kv))
    last = torch.randn(1, heads, 1, d)
    held = Cache(torch.randn(1, kv, seq + 2, d), torch.randn(1, kv, seq + 2, d), seq + 1)
    keys, values = (t[:, :, : seq + 1] for t in (held.k, held.v))

    def state(decoding: bool) -> Any:
        kept = {("means", 0): block_means(keys, 64)}
        decoder = SimpleNamespace(place="cpu")
        return SimpleNamespace(decoder=decoder, decoding=decoding, layer=0, kept=kept, note=lambda *_: None)

    blocks, cut, routing = BlockAttention(1.0 - sparsity), CacheCut(1.0 - sparsity), TokenRouting(1.0 - sparsity)
    prompt, step = state(decoding=False), state(decoding=True)
    yield "sparse_attention", "prefill", seconds_of(lambda: blocks.attend(prompt, q, k, v))
    yield "sparse_attention", "decode", seconds_of(lambda: blocks.attend(step, last, keys, values))
    yield "kv_cache", "prefill", seconds_of(lambda: cut.cut(prompt, held, q, k, v))
    chosen = torch.randperm(seq)[: round(seq * (1.0 - sparsity))].sort().values
    some, y = q.index_select(2, chosen), torch.randn(len(chosen), hidden)

    def routed(s: Any, x: Any, index: Any, y: Any) -> None:
        for _ in range(2):  # sublayers
            routing._chosen(s, "", router, x)
            x[0].index_select(0, index)
            x[0].index_add_(0, index, y)

    def routed_prompt() -> None:
        routed(prompt, x, chosen, y)
        routed_attention(some, k, v, chosen[None])

    yield "dynamic_depth", "prefill", seconds_of(routed_prompt)
    yield "dynamic_depth", "decode", seconds_of(lambda: routed(step, one, torch.zeros(1, dtype=torch.long), y[:1]))


def predicted(config: ModelConfig, seq: int, sparsity: float, family: str, phase: str, hw: HardwareProfile) -> float:
    """The same as the profile and the engine have it, s."""
    asked: dict[str, Any] = {"phases": [phase], "seq": [seq], "families": [family], "sparsities": [sparsity]}
    (case,), _ = settings_of(config, **asked, scenario=Scenario(dtype="fp32", engine=EXECUTED))
    p = forward_passes(WorkloadBatch.of([case.pruned]), hw)
    w, own_attention = p.workloads.rows, family == "sparse_attention" or (family, phase) == ("dynamic_depth", "prefill")
    part = np.isin(p.workloads.groups.role, w.role[w.overhead | (w.is_attention & own_attention)])
    return float(p.group_s[0, part].sum()) / config.layers


def main(profile: str) -> None:
    """Print every ratio, and the root mean square of their logs."""
    torch.set_num_threads(1)
    hw, logs = load_hardware(profile), []
    with torch.no_grad():
        for name, seq in SETTINGS:
            for sparsity in (0.25, 0.5):
                for family, phase, took in measured(load_model(name), seq, sparsity):
                    said = predicted(load_model(name), seq, sparsity, family, phase, hw)
                    logs.append(np.log(took / said))
                    print(f"{name} {seq} {family} {sparsity} {phase}: {1e6 * took:.0f} us, predicted {1e6 * said:.0f}")
    root = np.sqrt(np.mean(np.square(logs)))
    print(f"{np.exp(min(logs)):.1f} to {np.exp(max(logs)):.1f} times; root mean square of the log {root:.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
