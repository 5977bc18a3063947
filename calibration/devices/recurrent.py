"""Recurrences and convolutions as Transformers runs them where the packages of their kernels are
missing, as on a CPU: in plain torch. The functions are those of the installed library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from calibration.devices.protocol import Operator, Unsupported

Step = Callable[[int], Any]
States = Sequence[Any]  # copies of the state of all sequences

_MAMBA = "transformers.models.mamba2.modeling_mamba2"
_DELTA = "transformers.models.qwen3_5.modeling_qwen3_5"


def lacks() -> str:
    """Return what is missing to run these operators, or ""."""
    return "" if find_spec("transformers") else "Transformers (extra transformers)"


def _function(module: str, name: str) -> Any:
    try:
        # the fallback to plain torch, of which it warns, is what is measured
        import_module("transformers.utils.logging").set_verbosity_error()
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise Unsupported(f"{name}: expected Transformers 5.24 or later, which has it") from None


def short_conv(op: Operator, dtype: Any, states: States) -> Step:
    """The convolution of Mamba-2, with its activation; the state has the last positions."""
    weight = torch.randn(op.n, op.window, dtype=dtype)
    bias = torch.zeros(op.n, dtype=dtype)
    x = torch.randn(op.batch, op.m // op.batch, op.n, dtype=dtype).transpose(1, 2)
    if not op.prompt:
        update = _function(_MAMBA, "causal_conv1d_update")
        return lambda i: update(x, states[i], weight, bias, "silu")
    convolve = _function(_MAMBA, "causal_conv1d_fn")

    def prompt(i: int) -> Any:
        states[i].copy_(
            F.pad(x, (op.window, 0))[..., -op.window :]
            if x.shape[-1] < op.window
            else x[..., -op.window :]
        )
        return convolve(x, weight, bias, activation="silu")

    return prompt


def state_space(op: Operator, dtype: Any, states: States) -> Step:
    """The recurrence of Mamba-2, and the update of its state in the cache."""
    batch = op.batch
    tokens = op.m // op.batch
    heads = op.heads
    x = torch.randn(batch, tokens, heads, op.n, dtype=dtype)
    keys, queries = torch.randn(2, batch, tokens, op.kv_heads, op.head_dim, dtype=dtype)
    sizes = torch.randn(batch, tokens, heads, dtype=dtype)
    decay = -torch.ones(heads)
    direct = torch.ones(heads, dtype=dtype)
    bias = torch.ones(heads, dtype=dtype)
    if op.prompt:
        scan = _function(_MAMBA, "mamba2_chunk_scan")
        how = {"chunk_size": op.block, "D": direct, "dt_bias": bias, "dt_softplus": True}

        def prompt(i: int) -> None:
            _, final = scan(x, sizes, decay, keys, queries, return_final_states=True, **how)
            states[i].copy_(final)

        return prompt
    update = _function(_MAMBA, "mamba2_selective_state_update")
    of_head = (
        sizes.transpose(1, 2).expand(-1, -1, op.n),
        decay[:, None, None].expand(-1, op.n, op.head_dim),
        keys[:, 0],
        queries[:, 0],
        direct[:, None].expand(-1, op.n),
    )
    bias = bias[:, None].expand(-1, op.n)
    return lambda i: update(states[i], x[:, 0], *of_head, dt_bias=bias, dt_softplus=True)


def delta_net(op: Operator, dtype: Any, states: States) -> Step:
    """The convolution, gates and recurrence of a gated delta net, and the update of its state in
    the cache."""
    batch = op.batch
    tokens = op.m // op.batch
    keys = op.kv_heads * op.head_dim
    values = op.heads * op.n
    positions = [torch.zeros(batch, 2 * keys + values, op.window, dtype=dtype)]
    convolution = Operator(
        "short_conv", op.dtype, m=op.m, n=2 * keys + values, batch=batch, window=op.window
    )
    convolve = short_conv(convolution, dtype, positions)
    strength, decay = torch.randn(2, batch, tokens, op.heads, dtype=dtype)
    name = "torch_chunk_gated_delta_rule" if op.prompt else "torch_recurrent_gated_delta_rule"
    rule = _function(_DELTA, name)
    scale = -torch.ones(op.heads)
    how = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}

    def step(i: int) -> None:
        both = convolve(0).transpose(1, 2).split([keys, keys, values], dim=-1)
        widths = (op.head_dim, op.head_dim, op.n)
        q, k, v = (x.reshape(batch, tokens, -1, width) for x, width in zip(both, widths))
        g = scale.exp() * F.softplus(decay.float() + 1.0)
        first = None if op.prompt else states[i]
        _, final = rule(q, k, v, g=-g, beta=strength.sigmoid(), initial_state=first, **how)
        states[i].copy_(final)

    return step


BUILDERS: dict[str, Callable[[Operator, Any, States], Step]] = {
    "short_conv": short_conv,
    "state_space": state_space,
    "delta_net": delta_net,
}


def state_shape(op: Operator) -> tuple[int, ...]:
    """Return the shape of the state of all sequences."""
    if op.kind == "short_conv":
        return op.batch, op.n, op.window
    if op.kind == "state_space":
        return op.batch, op.heads, op.n, op.head_dim
    return op.batch, op.heads, op.head_dim, op.n
