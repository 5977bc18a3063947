"""Published shapes and counts of models, and the tensors of a checkpoint, written down without the code under test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Published:
    """Numbers from a model's card or technical report."""

    family: str  # which tensors a layer has
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    parameters: int  # total of the published checkpoint
    source: str


HUB = "safetensors total on the Hugging Face Hub"
CARD = "table of the model card"
SUM = "sum over the tensors of the published configuration (the checkpoint has no safetensors total)"

PUBLISHED = {
    "llama-7b": Published("llama", 4096, 32, 32, 32, 128, 11008, 32000, False, 6_738_415_616, HUB),
    "llama-2-7b": Published("llama", 4096, 32, 32, 32, 128, 11008, 32000, False, 6_738_415_616, HUB),
    "llama-2-13b": Published("llama", 5120, 40, 40, 40, 128, 13824, 32000, False, 13_015_864_320, HUB),
    "llama-2-70b": Published("llama", 8192, 80, 64, 8, 128, 28672, 32000, False, 68_976_648_192, HUB),
    "llama-3.1-8b": Published("llama", 4096, 32, 32, 8, 128, 14336, 128256, False, 8_030_261_248, HUB),
    "llama-3.1-70b": Published("llama", 8192, 80, 64, 8, 128, 28672, 128256, False, 70_553_706_496, HUB),
    "llama-3.2-1b": Published("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 1_235_814_400, HUB),
    "llama-3.2-3b": Published("llama", 3072, 28, 24, 8, 128, 8192, 128256, True, 3_212_749_824, HUB),
    "smollm2-135m": Published("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 134_515_008, HUB),
    "mistral-7b-v0.1": Published("llama", 4096, 32, 32, 8, 128, 14336, 32000, False, 7_241_732_096, HUB),
    "mistral-7b-v0.3": Published("llama", 4096, 32, 32, 8, 128, 14336, 32768, False, 7_248_023_552, HUB),
    "qwen2.5-7b": Published("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False, 7_615_616_512, HUB),
    "qwen2.5-0.5b": Published("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 494_032_768, HUB),
    "qwen3-8b": Published("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, 8_190_735_360, HUB),
    "qwen3-14b": Published("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False, 14_768_307_200, HUB),
    "qwen3-32b": Published("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 32_762_123_264, HUB),
    "gemma-2-9b": Published("gemma2", 3584, 42, 16, 8, 256, 14336, 256000, True, 9_241_705_984, HUB),
    "phi-3-mini-4k": Published("phi3", 3072, 32, 32, 32, 96, 8192, 32064, False, 3_821_079_552, HUB),
    "opt-13b": Published("opt", 5120, 40, 40, 40, 128, 20480, 50272, True, 12_853_473_280, SUM),
    "opt-66b": Published("opt", 9216, 64, 72, 72, 128, 36864, 50272, True, 65_719_701_504, SUM),
    "pythia-6.9b": Published("gpt_neox", 4096, 32, 32, 32, 128, 16384, 50432, False, 6_857_302_016, CARD),
}


def layer_tensors(p: Published) -> list[Shape]:
    """Shapes of the tensors of one layer, as the checkpoint of that family names them."""
    h, q, kv, i, d = p.hidden, p.heads * p.head_dim, p.kv_heads * p.head_dim, p.inner, p.head_dim
    gated: list[Shape] = [(i, h), (i, h), (h, i)]
    split: list[Shape] = [(q, h), (kv, h), (kv, h), (h, q)]
    norms: list[Shape] = [(h,), (h,)]
    plain: list[Shape] = [(h,), (i, h), (i,), (h, i), (h,), *norms, *norms]  # bias of o, the MLP, two layer norms
    return {
        "llama": [*split, *gated, *norms],
        "qwen2": [*split, (q,), (kv,), (kv,), *gated, *norms],
        "qwen3": [*split, (d,), (d,), *gated, *norms],
        "gemma2": [*split, *gated, *norms, *norms],
        "phi3": [(q + 2 * kv, h), (h, q), (2 * i, h), (h, i), *norms],
        "opt": [*split, (q,), (kv,), (kv,), *plain],
        "gpt_neox": [(3 * h, h), (3 * h,), (h, h), *plain],
    }[p.family]


def outer_tensors(p: Published) -> list[Shape]:
    """Shapes of the tensors outside the layers."""
    norm: list[Shape] = [(p.hidden,)] * (2 if p.family in ("opt", "gpt_neox") else 1)
    tables: list[Shape] = [(p.vocab, p.hidden)] * (1 if p.tied else 2)
    return norm + tables + ([(2050, p.hidden)] if p.family == "opt" else [])


def pass_flops(
    p: Published,
    batch: int,
    seq: int,
    *,
    causal: bool = True,
    every_logit: bool = False,
    window: Mapping[int, int] = {},
) -> int:
    """FLOPs of a prefill, counted matrix by matrix and query by query; ``window`` by layer."""
    total = 0
    for layer in range(p.layers):
        total += sum(2 * batch * seq * s[0] * s[1] for s in layer_tensors(p) if len(s) == 2)
        reach = window.get(layer, 0) or seq
        pairs = sum(min(i + 1, reach) if causal else seq for i in range(seq))
        total += 4 * batch * p.heads * p.head_dim * pairs
    return total + 2 * batch * (seq if every_logit else 1) * p.vocab * p.hidden
