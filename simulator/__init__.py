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
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator._version import __version__ as __version__

# Type checkers read these imports, but not __getattr__, which would make any name valid for them
if TYPE_CHECKING:
    from simulator.capacity import memory as memory
    from simulator.engines.engine import list_engines as list_engines
    from simulator.engines.engine import load_engine as load_engine
    from simulator.errors import InputError as InputError
    from simulator.hardware.library import list_hardware as list_hardware
    from simulator.hardware.library import load_hardware as load_hardware
    from simulator.hardware.profile import HardwareProfile as HardwareProfile
    from simulator.hardware.save import save_hardware as save_hardware
    from simulator.models.library import list_models as list_models
    from simulator.models.library import load_model as load_model
    from simulator.models.lower import lower as lower
    from simulator.models.model import Model as Model
    from simulator.plans.costs import Costs as Costs
    from simulator.plans.costs import costs as costs
    from simulator.plans.search import Plan as Plan
    from simulator.plans.search import search as search
    from simulator.plans.solve import Targets as Targets
    from simulator.prediction.claims import judge_claim as judge_claim
    from simulator.prediction.draft import draft as draft
    from simulator.prediction.explain import Step as Step
    from simulator.prediction.explain import waterfall as waterfall
    from simulator.prediction.result import Result as Result
    from simulator.prediction.result import Results as Results
    from simulator.prediction.service import serve as serve
    from simulator.prediction.sweep import sweep as sweep
    from simulator.prediction.table import predict as predict
    from simulator.prediction.table import speedup as speedup
    from simulator.prediction.table import speedups as speedups
    from simulator.prediction.table import table as table
    from simulator.prediction.tariff import Energy as Energy
    from simulator.prediction.tariff import Tariff as Tariff
    from simulator.pruning import FAMILIES as FAMILIES
    from simulator.pruning import prune as prune
    from simulator.pruning._family import Choice as Choice
    from simulator.pruning._family import Family as Family
    from simulator.pruning._methods import METHODS as METHODS
    from simulator.pruning._methods import Method as Method
    from simulator.request import Request as Request
    from simulator.uncertainty.intervals import workload_time as workload_time
    from simulator.uncertainty.operators import GemmOptions as GemmOptions
    from simulator.uncertainty.operators import gemm_time as gemm_time
    from simulator.workload import Workload as Workload
else:
    # name -> module, read from the imports above: ``import simulator`` stays fast, as a module is
    # imported at the first use of a name
    _HOME = {
        name: module
        for module, name in re.findall(
            r"^    from (simulator\.[\w.]+) import (\w+) as \2$",
            Path(__file__).read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }

    __all__ = sorted((*_HOME, "__version__"))

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'simulator' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return __all__
