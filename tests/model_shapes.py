"""Published shapes and counts of models, and the tensors of a checkpoint, written down without the
code under test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Published:
    """Numbers from a model's card or technical report."""

    family: str  # family of architectures that have the same tensors in a layer
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
    experts: int = 0
    active: int = 0  # routed experts that a token uses
    expert_inner: int = 0
    dense: tuple[int, int] = (0, 0)  # first layers without experts, and the width of their MLP
    # ranks of queries and latent; rotated, plain, value features
    latent: tuple[int, int, int, int, int] | None = None
    # layers, KV heads and MLP width of each run of equal layers
    runs: tuple[tuple[int, int, int], ...] = ()
    # published, 10^9, and a unit of their last digit
    active_parameters: tuple[float, float] = (0.0, 0.0)
    embedded: bool = True  # active parameters include the embedding
    # key and value heads, their features, positions of convolution
    delta: tuple[int, int, int, int, int] | None = None
    attention_every: int = 1  # a layer of so many has attention, the others a gated delta net


HUB = "safetensors total on the Hugging Face Hub"
CARD = "table of the model card"
COUNTED = "sum over the tensors of the published configuration; no published total was looked up"
SUM = (
    "sum over the tensors of the published configuration (the checkpoint has no safetensors total)"
)

PUBLISHED = {
    "llama-7b": Published("llama", 4096, 32, 32, 32, 128, 11008, 32000, False, 6_738_415_616, HUB),
    "llama-2-7b": Published(
        "llama", 4096, 32, 32, 32, 128, 11008, 32000, False, 6_738_415_616, HUB
    ),
    "llama-2-13b": Published(
        "llama", 5120, 40, 40, 40, 128, 13824, 32000, False, 13_015_864_320, HUB
    ),
    "llama-2-70b": Published(
        "llama", 8192, 80, 64, 8, 128, 28672, 32000, False, 68_976_648_192, HUB
    ),
    "llama-3.1-8b": Published(
        "llama", 4096, 32, 32, 8, 128, 14336, 128256, False, 8_030_261_248, HUB
    ),
    "llama-3.1-70b": Published(
        "llama", 8192, 80, 64, 8, 128, 28672, 128256, False, 70_553_706_496, HUB
    ),
    "llama-3.2-1b": Published("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 1_235_814_400, HUB),
    "llama-3.2-3b": Published(
        "llama", 3072, 28, 24, 8, 128, 8192, 128256, True, 3_212_749_824, HUB
    ),
    "smollm2-135m": Published("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 134_515_008, HUB),
    "mistral-7b-v0.1": Published(
        "llama", 4096, 32, 32, 8, 128, 14336, 32000, False, 7_241_732_096, HUB
    ),
    "mistral-7b-v0.3": Published(
        "llama", 4096, 32, 32, 8, 128, 14336, 32768, False, 7_248_023_552, HUB
    ),
    "qwen2.5-7b": Published(
        "qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False, 7_615_616_512, HUB
    ),
    "qwen2.5-0.5b": Published("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True, 494_032_768, HUB),
    "qwen3-8b": Published("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, 8_190_735_360, HUB),
    "qwen3-14b": Published(
        "qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False, 14_768_307_200, HUB
    ),
    "qwen3-32b": Published(
        "qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 32_762_123_264, HUB
    ),
    "gemma-2-9b": Published(
        "gemma2", 3584, 42, 16, 8, 256, 14336, 256000, True, 9_241_705_984, HUB
    ),
    "phi-3-mini-4k": Published(
        "phi3", 3072, 32, 32, 32, 96, 8192, 32064, False, 3_821_079_552, HUB
    ),
    "opt-13b": Published("opt", 5120, 40, 40, 40, 128, 20480, 50272, True, 12_853_473_280, SUM),
    "opt-66b": Published("opt", 9216, 64, 72, 72, 128, 36864, 50272, True, 65_719_701_504, SUM),
    "pythia-6.9b": Published(
        "gpt_neox", 4096, 32, 32, 32, 128, 16384, 50432, False, 6_857_302_016, CARD
    ),
    "gemma-3-12b": Published(
        "gemma3", 3840, 48, 16, 8, 256, 15360, 262208, True, 11_766_034_176, COUNTED
    ),
    "olmo-2-7b": Published(
        "olmo2", 4096, 32, 32, 32, 128, 11008, 100352, False, 7_298_617_344, COUNTED
    ),
    "granite-3.1-8b": Published(
        "llama", 4096, 40, 32, 8, 128, 12800, 49155, True, 8_170_848_256, COUNTED
    ),
    "smollm3-3b": Published(
        "llama", 2048, 36, 16, 4, 128, 11008, 128256, True, 3_075_098_624, COUNTED
    ),
    "minitron-4b": Published(
        "nemotron", 3072, 32, 24, 8, 128, 9216, 256000, False, 4_190_509_056, SUM
    ),
    "nemotron-super-49b": Published(
        "nas",
        8192,
        80,
        64,
        8,
        128,
        28672,
        128256,
        False,
        49_867_145_216,
        COUNTED,
        runs=(
            *(
                (1, 8, 14336),
                (5, 8, 28672),
                (2, 0, 14336),
                (3, 8, 28672),
                (1, 0, 17920),
                (30, 8, 28672),
                (1, 0, 7168),
            ),
            *(
                (2, 0, 14336),
                (1, 0, 7168),
                (1, 0, 28672),
                (1, 0, 7168),
                (1, 0, 14336),
                (3, 0, 7168),
                (1, 8, 28672),
            ),
            *(
                (1, 0, 7168),
                (2, 0, 5632),
                (1, 0, 7168),
                (3, 0, 5632),
                (2, 0, 7168),
                (2, 0, 2816),
                (2, 0, 5632),
            ),
            *((2, 0, 2816), (1, 0, 5632), (2, 0, 2816), (9, 8, 28672)),
        ),
    ),
    # active parameters: mistral.ai/news/mixtral-of-experts and /mixtral-8x22b
    "mixtral-8x7b": Published(
        "mixtral",
        4096,
        32,
        32,
        8,
        128,
        0,
        32000,
        False,
        46_702_792_704,
        COUNTED,
        experts=8,
        active=2,
        expert_inner=14336,
        active_parameters=(12.9, 0.1),
    ),
    "mixtral-8x22b": Published(
        "mixtral",
        6144,
        56,
        48,
        8,
        128,
        0,
        32000,
        False,
        140_620_634_112,
        COUNTED,
        experts=8,
        active=2,
        expert_inner=16384,
        active_parameters=(39, 1),
    ),
    # the model cards
    "qwen1.5-moe-a2.7b": Published(
        "qwen2_moe",
        2048,
        24,
        16,
        16,
        128,
        5632,
        151936,
        False,
        14_315_784_192,
        COUNTED,
        experts=60,
        active=4,
        expert_inner=1408,
        active_parameters=(2.7, 0.1),
    ),
    "qwen3-30b-a3b": Published(
        "qwen3_moe",
        2048,
        48,
        32,
        4,
        128,
        0,
        151936,
        False,
        30_532_122_624,
        COUNTED,
        experts=128,
        active=8,
        expert_inner=768,
        active_parameters=(3.3, 0.1),
    ),
    "qwen3-235b-a22b": Published(
        "qwen3_moe",
        4096,
        94,
        64,
        4,
        128,
        0,
        151936,
        False,
        235_093_634_560,
        COUNTED,
        experts=128,
        active=8,
        expert_inner=1536,
        active_parameters=(22, 1),
    ),
    # gpt-oss model card (arXiv 2508.10925), table 1: 20.91 and 116.83 B; active ones "including
    # unembedding"
    "gpt-oss-20b": Published(
        "gpt_oss",
        2880,
        24,
        64,
        8,
        64,
        0,
        201088,
        False,
        20_914_757_184,
        SUM,
        experts=32,
        active=4,
        expert_inner=2880,
        active_parameters=(3.61, 0.01),
        embedded=False,
    ),
    "gpt-oss-120b": Published(
        "gpt_oss",
        2880,
        36,
        64,
        8,
        64,
        0,
        201088,
        False,
        116_829_156_672,
        SUM,
        experts=128,
        active=4,
        expert_inner=2880,
        active_parameters=(5.13, 0.01),
        embedded=False,
    ),
    # arXiv 2405.04434, appendix B (15.7 B, 2.4 B), and arXiv 2412.19437 (671 B, 37 B); without
    # multi-token prediction
    "deepseek-v2-lite": Published(
        "deepseek_v2",
        2048,
        27,
        16,
        16,
        192,
        2816,
        102400,
        False,
        15_706_484_224,
        COUNTED,
        experts=64,
        active=6,
        expert_inner=1408,
        dense=(1, 10944),
        latent=(0, 512, 64, 128, 128),
        active_parameters=(2.4, 0.1),
        embedded=False,
    ),
    "deepseek-v3": Published(
        "deepseek_v3",
        7168,
        61,
        128,
        128,
        192,
        2048,
        129280,
        False,
        671_026_419_200,
        SUM,
        experts=256,
        active=8,
        expert_inner=2048,
        dense=(3, 18432),
        latent=(1536, 512, 64, 128, 128),
        active_parameters=(37, 1),
        embedded=False,
    ),
    # arXiv 2507.20534, table 2: 1.04 T, 32.6 B; the checkpoint has no further token to predict
    "kimi-k2": Published(
        "deepseek_v3",
        7168,
        61,
        64,
        64,
        192,
        2048,
        163840,
        False,
        1_026_408_232_448,
        SUM,
        experts=384,
        active=8,
        expert_inner=2048,
        dense=(1, 18432),
        latent=(1536, 512, 64, 128, 128),
        active_parameters=(32.6, 1),
        embedded=False,
    ),
    # arXiv 2508.06471, table 1: 106 B and 355 B, 12 B and 32 B, with a layer that predicts a
    # further token (not here)
    "glm-4.5-air": Published(
        "glm4_moe",
        4096,
        46,
        96,
        8,
        128,
        1408,
        151552,
        False,
        106_852_251_264,
        COUNTED,
        experts=128,
        active=8,
        expert_inner=1408,
        dense=(1, 10944),
        active_parameters=(12, 1),
        embedded=False,
    ),
    "glm-4.5": Published(
        "glm4_moe_norm",
        5120,
        92,
        96,
        8,
        128,
        1536,
        151552,
        False,
        352_797_829_024,
        COUNTED,
        experts=160,
        active=8,
        expert_inner=1536,
        dense=(3, 12288),
        active_parameters=(32, 1),
        embedded=False,
    ),
    # the model card: 80 B, 3 B; without the layer that predicts a further token
    "qwen3-next-80b-a3b": Published(
        "qwen3_next",
        2048,
        48,
        16,
        2,
        256,
        512,
        151936,
        False,
        79_674_391_296,
        COUNTED,
        experts=512,
        active=10,
        expert_inner=512,
        active_parameters=(3, 1),
        embedded=False,
        delta=(16, 32, 128, 128, 4),
        attention_every=4,
    ),
    # the model card: 109 B with the vision part, 17 B
    "llama-4-scout": Published(
        "llama4",
        5120,
        48,
        40,
        8,
        128,
        8192,
        202048,
        False,
        107_769_861_120,
        COUNTED,
        experts=16,
        active=1,
        expert_inner=8192,
        active_parameters=(17, 0.5),
    ),
    # the text decoder of 24.0 B; equal to Mistral-Small-24B-2501's safetensors total
    "mistral-small-3.1-24b": Published(
        "llama", 5120, 40, 32, 8, 128, 32768, 131072, False, 23_572_403_200, HUB
    ),
    # the text decoder of 8.29 B; equal to Qwen2.5-7B
    "qwen2.5-vl-7b": Published(
        "qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False, 7_615_616_512, HUB
    ),
}


def shape_of(p: Published, layer: int) -> tuple[int, int]:
    """KV heads and MLP width of a layer."""
    if layer < p.dense[0]:
        return p.kv_heads, p.dense[1]
    each = [widths for many, *widths in p.runs for _ in range(many)] or [
        [p.kv_heads, p.inner]
    ] * p.layers
    return each[layer][0], each[layer][1]


def attention_features(p: Published, layer: int) -> int:
    """Return the features of keys and values that a prefill multiplies per query-key pair, over all
    heads."""
    each = sum(p.latent[2:]) if p.latent else 2 * p.head_dim
    return p.heads * each if shape_of(p, layer)[0] and attends(p, layer) else 0


def attends(p: Published, layer: int) -> bool:
    """Whether a layer has attention, not a gated delta net."""
    return layer % p.attention_every == p.attention_every - 1


def layer_tensors(p: Published, layer: int = 0) -> list[Shape]:
    """Return the shapes of the tensors of one layer in a checkpoint of the family, without routed
    experts."""
    kv_heads, i = shape_of(p, layer)
    h, q, kv, d = p.hidden, p.heads * p.head_dim, kv_heads * p.head_dim, p.head_dim
    gated: list[Shape] = [(i, h), (i, h), (h, i)]
    split: list[Shape] = [(q, h), (kv, h), (kv, h), (h, q)]
    norms: list[Shape] = [(h,), (h,)]
    biases: list[Shape] = [(q,), (kv,), (kv,)]
    # bias of o, the MLP, two layer norms
    plain: list[Shape] = [(h,), (i, h), (i,), (h, i), (h,), *norms, *norms]
    routed: list[Shape] = [(p.experts, h)] if layer >= p.dense[0] else []
    score: list[Shape] = [(p.experts,) for _ in routed]  # bias of the router
    mixing = [(2 * q, h), *split[1:], (d,), (d,)] if attends(p, layer) else delta_tensors(p)
    return {
        "llama": [*split, *gated, *norms],
        "qwen2": [*split, *biases, *gated, *norms],
        "qwen3": [*split, (d,), (d,), *gated, *norms],
        "gemma2": [*split, *gated, *norms, *norms],
        "gemma3": [*split, (d,), (d,), *gated, *norms, *norms],
        "olmo2": [*split, (q,), (kv,), *gated, *norms],
        "phi3": [(q + 2 * kv, h), (h, q), (2 * i, h), (h, i), *norms],
        "opt": [*split, *biases, *plain],
        "gpt_neox": [(3 * h, h), (3 * h,), (h, h), *plain],
        "nemotron": [*split, (i, h), (h, i), *norms, *norms],
        "nas": [*([*split, (h,)] if kv else []), *gated, (h,)],
        "mixtral": [*split, *routed, *norms],
        "qwen2_moe": [*split, *biases, *gated, (1, h), *routed, *norms],
        "qwen3_moe": [*split, (d,), (d,), *routed, *norms],
        "gpt_oss": [*split, *biases, (h,), (p.heads,), *routed, (p.experts,), *norms],
        "deepseek_v2": [*latent_tensors(p), *gated, *routed, *norms],
        "deepseek_v3": [*latent_tensors(p), *gated, *routed, *score, *norms],
        "glm4_moe": [*split, *biases, *gated, *routed, *score, *norms],
        "glm4_moe_norm": [*split, *biases, (d,), (d,), *gated, *routed, *score, *norms],
        "qwen3_next": [*mixing, *gated, (1, h), *routed, *norms],
        "llama4": [*split, *gated, *routed, *norms],
    }[p.family]


def delta_tensors(p: Published) -> list[Shape]:
    """Return the tensors of a gated delta net: two projections, convolution, decays, norm of a
    head, and output projection."""
    if not p.delta:
        return []
    key_heads, value_heads, key, value, conv = p.delta
    keys, values, h = key_heads * key, value_heads * value, p.hidden
    own: list[Shape] = [
        (2 * keys + 2 * values, h),
        (2 * value_heads, h),
        (2 * keys + values, 1, conv),
    ]
    return [*own, (value_heads,), (value_heads,), (value,), (h, values)]


def latent_tensors(p: Published) -> list[Shape]:
    """Return the tensors of latent attention: projections to the ranks, their norms, projections
    from the ranks, and output projection."""
    if not p.latent:
        return []
    queries, rank, rotary, plain, value = p.latent
    h, wide = p.hidden, p.heads * (plain + rotary)
    own: list[Shape] = [(queries, h), (queries,), (wide, queries)] if queries else [(wide, h)]
    return [
        *own,
        (rank + rotary, h),
        (rank,),
        (p.heads * (plain + value), rank),
        (h, p.heads * value),
    ]


def expert_tensors(p: Published, layer: int) -> list[Shape]:
    """Tensors of one routed expert of a layer."""
    h, i = p.hidden, p.expert_inner
    if not p.experts or layer < p.dense[0]:
        return []
    biases: list[Shape] = [(2 * i,), (h,)] if p.family == "gpt_oss" else []
    return [(2 * i, h), (h, i), *biases]


def parameters_of(p: Published, experts: int) -> int:
    """Parameters of all layers with so many experts in those that have some."""
    of = lambda shapes: sum(math.prod(s) for s in shapes)  # noqa: E731
    return sum(
        of(layer_tensors(p, i)) + experts * of(expert_tensors(p, i)) for i in range(p.layers)
    )


def outer_tensors(p: Published) -> list[Shape]:
    """Shapes of the tensors outside the layers."""
    norm: list[Shape] = [(p.hidden,)] * (2 if p.family in ("opt", "gpt_neox", "nemotron") else 1)
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
        used = layer_tensors(p, layer) + p.active * expert_tensors(p, layer)
        total += sum(2 * batch * seq * s[0] * s[1] for s in used if len(s) == 2)
        reach = window.get(layer, 0) or seq
        pairs = sum(min(i + 1, reach) if causal else seq for i in range(seq))
        total += 2 * batch * attention_features(p, layer) * pairs
        # read, correct and read again the state of each value head
        if p.delta and not attends(p, layer):
            total += 3 * 2 * batch * seq * p.delta[1] * p.delta[2] * p.delta[3]
    return total + 2 * batch * (seq if every_logit else 1) * p.vocab * p.hidden
