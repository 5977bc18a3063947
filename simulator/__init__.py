"""prunesim: how much faster will a pruned LLM really be?

>>> import simulator
>>> hw = simulator.load_hardware("h100")
>>> model = simulator.load_model("llama-3.1-8b")
>>> dense = simulator.lower(model, phase="prefill", batch=1, seq=2048, engine="vllm")
>>> pruned = simulator.prune(dense, "depth", sparsity=0.25)
>>> bool(simulator.speedup(dense, pruned, hw).speedup > 1.2)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from simulator._version import __version__

if TYPE_CHECKING:
    from simulator.capacity import memory
    from simulator.engines.engine import list_engines, load_engine
    from simulator.errors import InputError
    from simulator.hardware.library import list_hardware, load_hardware
    from simulator.hardware.profile import HardwareProfile
    from simulator.hardware.save import save_hardware
    from simulator.models.config import ModelConfig
    from simulator.models.library import list_models, load_model
    from simulator.models.lower import lower
    from simulator.plans.costs import Costs, costs
    from simulator.plans.search import Plan, search
    from simulator.plans.solve import Targets
    from simulator.prediction.draft import draft
    from simulator.prediction.explain import Step, waterfall
    from simulator.prediction.result import Result, Results
    from simulator.prediction.service import serve
    from simulator.prediction.sweep import sweep
    from simulator.prediction.table import predict, speedup, speedups, table
    from simulator.pruning import FAMILIES, prune
    from simulator.pruning._methods import METHODS
    from simulator.request import Request
    from simulator.uncertainty.intervals import workload_time
    from simulator.uncertainty.operators import GemmOptions, gemm_time
    from simulator.workload import Workload

_MODULES = {
    "errors": "InputError",
    "engines.engine": "list_engines load_engine",
    "uncertainty.intervals": "workload_time",
    "uncertainty.operators": "GemmOptions gemm_time",
    "hardware.profile": "HardwareProfile",
    "hardware.library": "list_hardware load_hardware",
    "hardware.save": "save_hardware",
    "capacity": "memory",
    "pruning": "FAMILIES prune",
    "pruning._methods": "METHODS",
    "plans.costs": "Costs costs",
    "plans.search": "Plan search",
    "plans.solve": "Targets",
    "prediction.table": "predict speedup speedups table",
    "prediction.result": "Result Results",
    "prediction.service": "serve",
    "request": "Request",
    "prediction.draft": "draft",
    "prediction.explain": "Step waterfall",
    "prediction.sweep": "sweep",
    "models.config": "ModelConfig",
    "models.library": "list_models load_model",
    "models.lower": "lower",
    "workload": "Workload",
}
# name -> module; imported on first use, so that ``import simulator`` stays fast
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Costs",
    "FAMILIES",
    "GemmOptions",
    "HardwareProfile",
    "InputError",
    "METHODS",
    "ModelConfig",
    "Plan",
    "Request",
    "Result",
    "Results",
    "Step",
    "Targets",
    "Workload",
    "__version__",
    "costs",
    "draft",
    "gemm_time",
    "list_engines",
    "list_hardware",
    "list_models",
    "load_engine",
    "load_hardware",
    "load_model",
    "lower",
    "memory",
    "predict",
    "prune",
    "save_hardware",
    "search",
    "serve",
    "speedup",
    "speedups",
    "sweep",
    "table",
    "waterfall",
    "workload_time",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simulator' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"simulator.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
