"""Read the linear products of a model from the modules that Transformers builds of its
configuration.

The model is built on torch's meta device, which holds shapes and no memory. Only classes of the
installed library are built; code of a model's repository is never run. torch and transformers are
imported when a model is traced.
"""

from __future__ import annotations

import difflib
import logging
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError, needs_extra, one_line
from simulator.models.architectures import ARCHITECTURES, NESTED
from simulator.models.architectures.reader import Content

Product = tuple[int, int, int]  # outputs, inputs, number of products


@dataclass(frozen=True)
class TracedProduct:
    """A linear product, or several equal ones (experts)."""

    path: str  # module in its layer
    n: int  # outputs
    k: int  # inputs
    count: int = 1
    shared: bool = False  # an earlier layer holds the weight


@dataclass(frozen=True)
class TracedPart:
    """A decoder layer, or what surrounds the layers."""

    # products that a pass computes, with shared weights in each layer
    products: tuple[TracedProduct, ...]
    parameters: int  # shared weights count in the first layer alone
    norms: tuple[tuple[str, int], ...] = ()  # modules and their parameters


@dataclass(frozen=True)
class TracedModel:
    """The decoder of a model, and the parameters of its other parts (vision, audio)."""

    layers: tuple[TracedPart, ...]
    rest: TracedPart  # embeddings, final norm, and others
    head: TracedPart
    apart: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """Parameters of the decoder and its head; tied weights count once."""
        return sum(part.parameters for part in (*self.layers, self.rest, self.head))


MAX_LAYERS = 1_000  # layers of a model that is built, and entries of its lists
MAX_SIZE = 10_000_000  # largest width, number of heads or experts, or a vocabulary
MAX_SECONDS = 60.0  # most processor time for building a model


def outputs_by_inputs(products: Iterable[Product]) -> dict[int, int]:
    """Return the sum of outputs of products with equal inputs, which one product can compute."""
    outputs: dict[int, int] = defaultdict(int)
    for n, k, count in products:
        outputs[k] += n * count
    return outputs


def _classes() -> dict[str, str]:
    """Return the names of Transformers' classes of language models by model type."""
    from transformers.models.auto import modeling_auto

    return {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }


def causal_types() -> set[str]:
    """Return the model types that the installed Transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    return {*CLASSES}


def transformers_config(data: Content, source: str) -> Any:
    """Return the configuration object of Transformers; InputError if it refuses the keys, or if a
    size would take very long to build."""
    _refuse_large(data, source)
    kind = str(data.get("model_type"))
    near = difflib.get_close_matches(kind, [*ARCHITECTURES, *NESTED], 1, cutoff=0.0)[0]
    nearest = f"; the nearest type in a table is {near}"
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            what = f"{source}: model_type {kind}, which no table has,"
            raise needs_extra(what, "transformers", package, nearest)
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING or kind not in _classes():
        unknown = f"no table has {shown(kind)}, and no decoder of Transformers {__version__}"
        raise InputError(f"{source}: model_type: {unknown}{nearest}")
    with _quiet(), _refusals(source):
        return CONFIG_MAPPING[kind].from_dict(deepcopy(dict(data)))


def trace(config: Any, source: str) -> TracedModel:
    """Return the products of the model of a configuration object; InputError if Transformers does
    not build it."""
    with _quiet(), _refusals(source):
        model = _built(config)
    return _Tracer(model).traced()


_UNBUILT = re.compile("position|length|theta")  # keys of numbers that make no tensors


def _refuse_large(value: Any, place: str, key: str = "") -> None:
    """Raise InputError for a number or a list in a configuration that is too large to build."""
    if isinstance(value, Mapping):
        for name, inside in value.items():
            _refuse_large(inside, f"{place}: {name}", str(name))
    most = MAX_LAYERS if key.endswith(("layer", "layers")) else MAX_SIZE
    if isinstance(value, list) and len(value) > MAX_LAYERS:
        raise InputError(f"{place}: expected at most {MAX_LAYERS:,} entries, got {len(value):,}")
    if isinstance(value, int) and abs(value) > most and not _UNBUILT.search(key):
        raise InputError(f"{place}: expected at most {most:,}, got {shown(value)}")


@contextmanager
def _refusals(source: str) -> Iterator[None]:
    """Turn errors of Transformers, which can be of any type, into InputError."""
    try:
        yield
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise InputError(f"{source}: Transformers does not build the model ({reason})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of Transformers about tokens and defaults."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _deadline() -> Any:
    """Return a context in which torch makes no tensor after :data:`MAX_SECONDS`."""
    from torch.overrides import TorchFunctionMode

    end = time.thread_time() + MAX_SECONDS

    class Deadline(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if time.thread_time() > end:
                raise TimeoutError(f"building takes over {MAX_SECONDS:.0f} s")
            return func(*args, **(kwargs or {}))

    return Deadline()


def _built(config: Any) -> Any:
    import torch
    import transformers

    classes = _classes()
    kind = getattr(transformers, classes[config.model_type])
    text = config.get_text_config()
    if not isinstance(config, kind.config_class):
        config = text
    with torch.device("meta"), _deadline():
        try:
            return kind(config)
        except ImportError:  # a library of another part (vision) is missing
            return getattr(transformers, classes[text.model_type])(text)


# children of a decoder that embed images or sound
_APART = re.compile(r"vision|visual|image|audio|speech|embed_tokens_extend")
# parameters that multiply their input although their module is not a linear layer: routers, stacked
# experts, heads of Mamba, mixes of residual streams
_MULTIPLIES = re.compile(r"\w+_proj|proj|(\w+_proj_|\w+_gate_)?weight|(hc_)?fn|w1|v1|w2")
_WRITES = re.compile("down|output|w2")  # weights of experts whose outputs are the hidden features
_ROUTER_BIAS = re.compile("e_score_correction_bias|balancing_biases")
_ONE_OF = "_adapter_list."  # lists of which a layer runs one module (Zamba2)
_NUMBER = re.compile(r"\b\d+\b")


class _Tracer:
    """Reads one model. A parameter that several modules share is counted once."""

    def __init__(self, model: Any):
        self.model = model
        self.hidden = getattr(model.config.get_text_config(), "hidden_size", 0)
        self.counted: set[int] = set()

    def traced(self) -> TracedModel:
        head = self.model.get_output_embeddings()
        layers = self._layers()
        inside = {id(module) for module in (*layers.modules(), head)}
        outside = [(name, m) for name, m in self.model.named_modules() if id(m) not in inside]
        parts = tuple(self._part(layer.named_modules()) for layer in layers)
        rest = self._part((name, module) for name, module in outside if not self._other(name))
        apart: Counter[str] = Counter()
        for name, module in outside:
            if other := self._other(name):
                apart[other] += self._part([(name, module)]).parameters
        return TracedModel(
            layers=parts,
            rest=rest,
            head=self._part([("head", head)]),
            apart=dict(apart),
        )

    def _layers(self) -> Any:
        """Return the decoder layers: the largest list of modules of the decoder."""
        from torch.nn import ModuleList

        lists = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, ModuleList) and not _NUMBER.search(name) and not self._other(name)
        ]
        return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))

    @cached_property
    def _decoder(self) -> tuple[str, str]:
        """Names of the base model and of the decoder in it."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return names[id(self.model.base_model)], names.get(id(self.model.get_decoder()), "")

    def _other(self, name: str) -> str:
        """Return the part beside the decoder to which a module belongs, else ""."""
        base, decoder = self._decoder
        inner = name.removeprefix(f"{base}.")
        child = inner.split(".")[0]
        nested = inner != name and decoder.startswith(f"{base}.")
        beside = nested and not name.startswith(decoder)
        return child if beside or _APART.search(child) else ""

    def _part(self, modules: Iterable[tuple[str, Any]]) -> TracedPart:
        counts: Counter[tuple[str, int, int, bool]] = Counter()
        norms = []
        parameters = 0
        for path, module in modules:
            if "norm" in type(module).__name__.lower():
                norms.append((path, sum(p.numel() for p in module.parameters())))
            for name, (n, k, count) in self._products(module).items():
                place = _NUMBER.sub("*", path if name == "weight" else f"{path}.{name}")
                key = place, n, k, id(getattr(module, name)) in self.counted
                counts[key] = count if _ONE_OF in path else counts[key] + count
            parameters += self._uncounted(module)
        found = [TracedProduct(*key[:3], count, key[3]) for key, count in counts.items()]
        return TracedPart(tuple(found), parameters, tuple(norms))

    def _uncounted(self, module: Any) -> int:
        """Return the number of a module's own parameters that are not counted yet, and count
        them."""
        own: dict[int, int] = {id(p): p.numel() for p in module.parameters(recurse=False)}
        # checkpoints store and count the biases of routers, which are no parameters of torch
        buffers = module.named_buffers(recurse=False)
        own |= {id(b): b.numel() for name, b in buffers if _ROUTER_BIAS.fullmatch(name)}
        size = sum(own[key] for key in own.keys() - self.counted)
        self.counted |= own.keys()
        return size

    def _products(self, module: Any) -> dict[str, Product]:
        """Return the products of a module's own parameters by name."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        # Cohere's norm of heads has a weight per head
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm"):
            return {}
        if isinstance(module, nn.Linear):
            return {"weight": (*module.weight.shape, 1)}
        if isinstance(module, Conv1D):  # it stores inputs x outputs
            k, n = module.weight.shape
            return {"weight": (n, k, 1)}
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            n, inputs = module.weight.shape[:2]
            return {} if inputs == 1 else {"weight": (n, module.weight[0].numel(), 1)}
        return {
            name: self._stacked(module, name, tuple(parameter.shape))
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() in (2, 3) and _MULTIPLIES.fullmatch(name)
        }

    def _stacked(self, module: Any, name: str, shape: tuple[int, ...]) -> Product:
        """Return the products of one parameter, which may be of several experts or heads."""
        *counts, rows, columns = shape
        # DBRX stacks the rows of its experts
        count = counts[0] if counts else getattr(module, "moe_num_experts", 1)
        rows = rows if counts else rows // count
        transposed = self._transposed(module, name, rows, columns)
        return (columns, rows, count) if transposed else (rows, columns, count)

    def _transposed(self, module: Any, name: str, rows: int, columns: int) -> bool:
        """Return whether a weight is stored as inputs x outputs."""
        stated = getattr(module, "is_transposed", None)
        if stated is not None:
            return bool(stated)
        if (outputs := getattr(module, "output_size", None)) is not None:  # JetMoE's experts
            return bool(outputs != rows)
        if "Expert" not in type(module).__name__:
            return name == "proj"  # products of relative positions (Inkling)
        outer, inner = (columns, rows) if _WRITES.search(name) else (rows, columns)
        return bool(outer == self.hidden != inner)
