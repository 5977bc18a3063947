"""Write the ``config.json`` of a dense or pruned model for vLLM, and check that it has the predicted shapes.

Use :class:`Models`: vLLM builds a model from its ``config.json`` alone, with random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from calibration.runners.cases import Case
from simulator.codes import ROLES, Kind
from simulator.errors import InputError
from simulator.models.changes import changed_keys
from simulator.models.config import ModelConfig
from simulator.models.huggingface import from_hf_config
from simulator.models.lower import lower
from simulator.prediction.loading import shapes_of
from simulator.prediction.runnable import will_run
from simulator.workload import Workload

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_v2": "DeepseekV2ForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM",
        "gemma": "GemmaForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "glm4_moe": "Glm4MoeForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "granite": "GraniteForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "mixtral": "MixtralForCausalLM",
        "nemotron": "NemotronForCausalLM",
        "opt": "OPTForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "qwen3_next": "Qwen3NextForCausalLM",
    }
)
"""Supported ``model_type`` -> class in vLLM's registry (``vllm/model_executor/models/registry.py``)."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_DROPPED = ("auto_map", "quantization_config", "text_config", "vision_config", "architectures")
"""Keys of code, of stored formats and of parts that are not timed."""

ModelShape = tuple[str, str, int, int, int, int, int, int]


@dataclass(frozen=True)
class Models:
    """Writes the configurations of a dense model and of its prunings.

    Parameters
    ----------
    dense : ModelConfig
        Shapes of the dense model, all layers or the first ones.
    content : mapping
        Content of its ``config.json``: :func:`simulator.models.changes.content_of`.
    """

    dense: ModelConfig
    content: Mapping[str, Any]

    def __post_init__(self) -> None:
        name, kind = self.dense.name, self.dense.architecture
        if not self.content:
            raise InputError(f"{name}: vLLM needs a config.json to start from; expected a name or a file")
        if kind not in CLASSES:
            raise InputError(f"{name}: model_type {kind!r}: expected one of {', '.join(CLASSES)} to run in vLLM")
        if self.dense.weight_dtype:
            raise InputError(f"{name}: its weights are stored in {self.dense.weight_dtype}; expected 16 or 32 bits")
        self.config_of(self.dense)

    def config_of(self, model: ModelConfig) -> dict[str, Any]:
        """Return the content of the ``config.json`` of the dense model with other layers, widths or experts.

        InputError: the keys of this architecture cannot state the shapes.
        """
        text = self.content.get("text_config")
        own = {**self.content, **(text if isinstance(text, Mapping) else {})}
        own = {key: value for key, value in own.items() if key not in _DROPPED and not key.startswith("_")}
        own["model_type"] = self.dense.architecture
        if model.experts:
            key = next(key for key in _EXPERTS if key in own)
            own |= {key: model.experts, "num_experts_per_tok": int(model.active)}
        given = from_hf_config(own, name=model.name)
        return {**own, **changed_keys(given, model, own), "architectures": [CLASSES[model.architecture]]}

    def pruned(self, case: Case) -> ModelConfig:
        """Return the pruned model of a case; InputError if vLLM cannot load it, or would build other shapes."""
        meta = case.pruned.meta
        if meta.devices > 1:
            raise InputError(f"devices: expected 1 to run in vLLM, got {meta.devices}")
        vllm = case.run_in("vllm").pruned
        if (answer := will_run(vllm, config=replace(self.dense, mismatch=""))).works is False:
            raise InputError(answer.sentence.removeprefix("No: ").rstrip("."))
        model = shapes_of(self.dense, case.pruned)
        self.config_of(model)
        built = lower(
            model,
            phase=meta.phase,
            batch=meta.batch,
            seq=meta.seq,
            new_tokens=meta.new_tokens,
            dtype=meta.dtype,
            engine=meta.engine,
        )
        expected, found = shapes(case.pruned), shapes(built)
        if different := sorted((expected - found) + (found - expected)):
            _, role, n, k, heads, *_ = different[0]
            where = f"{heads} heads" if heads else f"n={n}, k={k}"
            raise InputError(f"vLLM would not build the predicted shapes, such as {role} with {where}")
        return model


def shapes(w: Workload) -> Counter[ModelShape]:
    """Return how often each operator shape of projections, experts and attention occurs in a workload."""
    timed = w.take((w.kind != Kind.ELEMENTWISE) & (w.kind != Kind.COLLECTIVE))
    out = Counter[ModelShape]()
    for kind, role, n, k, heads, kv_heads, experts, window, count in zip(
        timed.kind.tolist(),
        timed.role.tolist(),
        timed.n.tolist(),
        timed.k.tolist(),
        timed.heads.tolist(),
        timed.kv_heads.tolist(),
        timed.experts.tolist(),
        timed.window.tolist(),
        timed.count.tolist(),
    ):
        out[Kind(kind).name, ROLES[role], n, k, heads, kv_heads, experts, window] += round(count)
    return out
