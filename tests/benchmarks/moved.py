"""Compare the predictions of two versions on a seeded sample of models, GPUs, engines, prunings,
phases, batches and lengths.

Run ``python tests/benchmarks/moved.py write FILE [several]`` in a checkout of each version
(``several``: on 2 and 4 devices), then ``python tests/benchmarks/moved.py compare OLD NEW``: it
counts equal predictions and states the largest relative difference by family.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import simulator

ONE_DEVICE, SEVERAL, LIMIT = 20_000, 4_000, 1e-9
HARDWARE = ["h100", "a100", "rtx_4090", "l40s", "b200", "mi300x", "h200"]
ENGINES = ["vllm", "hf", "sglang", "trtllm", "compile", ""]
SHARES = [0.1, 0.2, 0.25, 0.3, 0.5, 0.07]
EXPERTS = ["{f}", "{f} merged=true", "{f} fewer=active", "{f} fewer=average"]
DYNAMIC = [
    "token {f}",
    "dynamic_depth {f}",
    "dynamic_depth {f} prune_kv=true",
    "dynamic_depth {f} unit=layer kernel=gathered",
    "dynamic_width {f}",
    "dynamic_width {f} kernel=looped",
    "sparse_attention {f}",
    "sparse_attention budget=512",
    "kv_cache {f}",
    "kv_cache budget=256 rolling=true",
]
MIXED = [
    "width mlp={f} + depth {g}",
    "width {f} layers=4-9",
    "width mlp={f} layers=1-3 + depth {g}",
    "token {f} + depth {g}",
    "dynamic_depth {f} + width {g}",
    "sparse_attention {f} + width mlp={g} + depth {f}",
    "kv_cache {f} + experts {g}",
    "unstructured q={f} down={g}",
    "semi_structured mlp=0.5",
    "low_rank mlp={f}",
    "depth layers=3-5",
    "calm {f}",
    "pyramiddrop {f}",
    "llm-pruner {f}",
    "slicegpt {f}",
    "minitron-width {f}",
    "sheared-llama {f}",
    "low_rank {f} + semi_structured",
]


def pruning(draw: random.Random) -> str:
    kind, f, g = draw.randrange(16), draw.choice(SHARES), draw.choice(SHARES)
    texts = [
        "depth {f}",
        "width {f}",
        "width mlp={f}",
        "width attention={f} mlp={g}",
        "width heads={f}",
        "width kv={f}",
        "width hidden={f}",
        "width_cross {f}" + draw.choice(["", " residual_projections=true"]),
        "depth attention={f}",
        "depth {f} unit=mlp",
        "semi_structured",
        "unstructured {f}" + draw.choice(["", " kernel=spmv"]),
        "low_rank {f}",
        "experts " + draw.choice(EXPERTS),
        draw.choice(DYNAMIC),
        draw.choice(MIXED),
    ]
    return texts[kind].format(f=f, g=g)


def requests(several: bool) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield a model, a pruning, a GPU and settings."""
    draw, models = random.Random(8 if several else 7), list(simulator.list_models())
    for _ in range(SEVERAL if several else ONE_DEVICE):
        model, text, gpu = draw.choice(models), pruning(draw), draw.choice(HARDWARE)
        settings: dict[str, Any] = {"engine": draw.choice(ENGINES) or "vllm"}
        settings["phase"] = draw.choice(["prefill", "decode", "generate", "serve"])
        settings["batch"] = draw.choice([1, 2, 8, 33])
        settings["seq"] = draw.choice([100, 1024, 5000])
        settings["new_tokens"] = draw.choice([16, 64])
        number_format = draw.random()
        if number_format < 0.15:
            settings["dtype"] = "fp8"
        elif number_format < 0.3:
            settings["weight_dtype"] = "int4" if number_format < 0.25 else "int8"
        if draw.random() < 0.1:
            settings["ideal"] = True
        if several:
            settings["devices"] = draw.choice([2, 4])
            settings["parallel"] = draw.choice(["tensor", "tensor", "expert", "pipeline"])
        yield model, text, gpu, settings


def predicted(model: str, text: str, gpu: str, settings: dict[str, Any]) -> dict[str, float] | str:
    """Return the numbers of a prediction, or the message that refuses it."""
    try:
        found = simulator.predict(model, text, gpu, **settings).to_dict()
    except simulator.InputError as error:
        return str(error)
    return {name: value for name, value in found.items() if type(value) in (int, float)}


def compare(old: list[Any], new: list[Any]) -> None:
    outcomes: Counter[str] = Counter()
    worst: dict[str, float] = defaultdict(float)
    for (request, before), (same_request, after) in zip(old, new, strict=True):
        assert request == same_request
        if isinstance(before, str) or isinstance(after, str):
            refused = isinstance(before, str), isinstance(after, str)
            outcomes[f"refused before, now: {refused}"] += 1
            continue
        differences = (
            abs(before[name] - after[name]) / max(abs(before[name]), 1e-300)
            for name in before.keys() & after.keys()
        )
        most = max(differences)
        outcomes["equal" if most <= LIMIT else "moved"] += 1
        if most > LIMIT:
            family = f"{request[1].split()[0]}, {request[0]}"
            worst[family] = max(worst[family], most)
    print(dict(outcomes))
    for family, most in sorted(worst.items()):
        print(f"{family:45s} {most:.2g}")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        rows = [(request, predicted(*request)) for request in requests("several" in sys.argv[3:])]
        Path(sys.argv[2]).write_text("\n".join(json.dumps(row) for row in rows))
    else:
        files = (Path(name).read_text().splitlines() for name in sys.argv[2:4])
        compare(*([json.loads(line) for line in file] for file in files))
