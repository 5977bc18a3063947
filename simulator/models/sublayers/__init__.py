"""Kinds of sublayers, one file each."""

from simulator.models.sublayers.attention import Attention
from simulator.models.sublayers.base import Sublayer
from simulator.models.sublayers.delta_net import DeltaNet
from simulator.models.sublayers.experts import Experts
from simulator.models.sublayers.latent import LatentAttention
from simulator.models.sublayers.linear import Linear
from simulator.models.sublayers.mlp import Mlp

__all__ = [
    "Attention",
    "DeltaNet",
    "Experts",
    "LatentAttention",
    "Linear",
    "Mlp",
    "Sublayer",
]
