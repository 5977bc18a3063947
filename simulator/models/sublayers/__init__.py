"""Kinds of sublayers, one file each."""

from simulator.models.sublayers.altup import AltUp
from simulator.models.sublayers.attention import Attention
from simulator.models.sublayers.attention_experts import AttentionExperts
from simulator.models.sublayers.base import Sublayer
from simulator.models.sublayers.compressed import CompressedAttention
from simulator.models.sublayers.convolved import ConvolvedAttention
from simulator.models.sublayers.delta_net import DeltaNet
from simulator.models.sublayers.experts import Experts
from simulator.models.sublayers.latent import LatentAttention
from simulator.models.sublayers.laurel import Laurel
from simulator.models.sublayers.layer_inputs import LayerInputs
from simulator.models.sublayers.lightning import LightningAttention
from simulator.models.sublayers.linear import Linear
from simulator.models.sublayers.mamba import Mamba
from simulator.models.sublayers.mamba2 import Mamba2
from simulator.models.sublayers.mlp import Mlp
from simulator.models.sublayers.modules import Modules
from simulator.models.sublayers.projection import Projection
from simulator.models.sublayers.relative import RelativeAttention
from simulator.models.sublayers.residual_scale import ResidualScale
from simulator.models.sublayers.shared_cache import SharedCacheAttention
from simulator.models.sublayers.short_conv import ShortConv

__all__ = [
    "AltUp",
    "Attention",
    "AttentionExperts",
    "CompressedAttention",
    "ConvolvedAttention",
    "DeltaNet",
    "Experts",
    "LatentAttention",
    "Laurel",
    "LayerInputs",
    "LightningAttention",
    "Linear",
    "Mamba",
    "Mamba2",
    "Mlp",
    "Modules",
    "Projection",
    "RelativeAttention",
    "ResidualScale",
    "SharedCacheAttention",
    "ShortConv",
    "Sublayer",
]
