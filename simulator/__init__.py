"""prunesim: how much faster will a pruned LLM really be?

>>> import simulator
>>> hw = simulator.load_hardware("h100")
>>> model = simulator.load_model("llama-3.1-8b")
>>> dense = simulator.lower(model, phase="prefill", batch=1, seq=2048)
>>> pruned = simulator.prune(dense, "depth", sparsity=0.25)
>>> bool(simulator.speedup(dense, pruned, hw).speedup > 1.2)
True
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from simulator._version import __version__

if TYPE_CHECKING:
    from simulator.errors import InputError
    from simulator.execution import cost
    from simulator.gemm import gemm_time
    from simulator.hardware import HardwareProfile, list_hardware, load_hardware, save_hardware
    from simulator.memory import memory
    from simulator.pruning import FAMILIES, prune
    from simulator.speedup import Speedup, Step, speedup, speedups, waterfall
    from simulator.transformer import ModelConfig, list_models, load_model, lower
    from simulator.workload import Workload

# name -> module; imported on first use, so that ``import simulator`` stays fast
_HOME = {
    "InputError": "errors",
    "cost": "execution",
    "gemm_time": "gemm",
    "HardwareProfile": "hardware",
    "list_hardware": "hardware",
    "load_hardware": "hardware",
    "save_hardware": "hardware",
    "memory": "memory",
    "FAMILIES": "pruning",
    "prune": "pruning",
    "Speedup": "speedup",
    "Step": "speedup",
    "speedup": "speedup",
    "speedups": "speedup",
    "waterfall": "speedup",
    "ModelConfig": "transformer",
    "list_models": "transformer",
    "load_model": "transformer",
    "lower": "transformer",
    "Workload": "workload",
}

__all__ = [
    "FAMILIES", "HardwareProfile", "InputError", "ModelConfig", "Speedup", "Step", "Workload", "__version__", "cost", "gemm_time",
    "list_hardware", "list_models", "load_hardware", "load_model", "lower", "memory", "prune", "save_hardware", "speedup", "speedups",
    "waterfall",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simulator' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"simulator.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps ``simulator.speedup`` and ``simulator.memory`` the functions, although modules of the same name are imported beneath them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
