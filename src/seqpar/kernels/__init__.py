"""The numerical parts, each a folder with its definition (`reference.py`), a fast form, and one validated entry."""

from seqpar.kernels.attention import attention
from seqpar.kernels.dispatch import Backend, choose_backend
from seqpar.kernels.experts import combine, experts, route, sort_by_expert
from seqpar.kernels.invariance import is_cut_invariant, is_row_invariant
from seqpar.kernels.linear import linear, linear_backend
from seqpar.kernels.merge import add_sinks, merge
from seqpar.kernels.rms_norm import add_rms_norm, rms_norm
from seqpar.kernels.rotary import RopeConfig, norm_rotary, rope_table, rotary
from seqpar.kernels.sparse import BlockLists, sparse_attention
from seqpar.kernels.swiglu import swiglu
from seqpar.kernels.tile import tile_attention, tile_gradients

__all__ = [
    "Backend",
    "BlockLists",
    "RopeConfig",
    "add_rms_norm",
    "add_sinks",
    "attention",
    "choose_backend",
    "combine",
    "experts",
    "is_cut_invariant",
    "is_row_invariant",
    "linear",
    "linear_backend",
    "merge",
    "norm_rotary",
    "rms_norm",
    "rope_table",
    "rotary",
    "route",
    "sort_by_expert",
    "sparse_attention",
    "swiglu",
    "tile_attention",
    "tile_gradients",
]
