"""Parallel transformer layers: ordinary modules that hold slices and take a group.

Each layer that communicates is written once, as a generator of steps (`seqpar.comm.Steps`): `forward` runs it serially,
schedules drive several at once.
"""

from seqpar.layers.base import (
    ShardedModule,
    Source,
    gather_state_dict,
    iter_sources,
    name_modules,
    sync_gradients,
)
from seqpar.layers.csa import Certified, CSAAttention, CSAResult, Policy, Strided, TopMass
from seqpar.layers.decoder import ParallelAttention, ParallelDecoderLayer, add_layouts
from seqpar.layers.embedding import ParallelLMHead, VocabParallelEmbedding, gather_rows, gather_rows_steps
from seqpar.layers.heads import HeadParameter
from seqpar.layers.linear import (
    ColumnParallelLinear,
    GateUpParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    Shard,
)
from seqpar.layers.mlp import ParallelMLP
from seqpar.layers.moe import ExpertPlacement, ParallelMoE
from seqpar.layers.norm import RMSNorm
from seqpar.layers.overlap import OverlappedAttention, OverlappedMLP
from seqpar.layers.pipeline import PipelineStage
from seqpar.layers.placed import PlacedCore
from seqpar.layers.qship import QShipDecodeAttention
from seqpar.layers.ring import CachedKV, RingAttention, placed_rows
from seqpar.layers.segments import compile_segments, restore_segments
from seqpar.layers.striped import (
    heads_to_stripes,
    heads_to_stripes_steps,
    stripes_to_heads,
    stripes_to_heads_steps,
    tokens_to_stripes,
    tokens_to_stripes_steps,
)
from seqpar.layers.threephase import PipelinedUlysses
from seqpar.layers.ulysses import UlyssesAttention
from seqpar.layers.usp import USPAttention

__all__ = [
    "CSAAttention",
    "CSAResult",
    "CachedKV",
    "Certified",
    "ColumnParallelLinear",
    "ExpertPlacement",
    "GateUpParallelLinear",
    "HeadParameter",
    "OverlappedAttention",
    "OverlappedMLP",
    "ParallelAttention",
    "ParallelDecoderLayer",
    "ParallelLMHead",
    "ParallelMLP",
    "ParallelMoE",
    "PipelineStage",
    "PipelinedUlysses",
    "PlacedCore",
    "Policy",
    "QKVParallelLinear",
    "QShipDecodeAttention",
    "RMSNorm",
    "RingAttention",
    "RowParallelLinear",
    "Shard",
    "ShardedModule",
    "Source",
    "Strided",
    "TopMass",
    "USPAttention",
    "UlyssesAttention",
    "VocabParallelEmbedding",
    "add_layouts",
    "compile_segments",
    "gather_rows",
    "gather_rows_steps",
    "gather_state_dict",
    "heads_to_stripes",
    "heads_to_stripes_steps",
    "iter_sources",
    "name_modules",
    "placed_rows",
    "restore_segments",
    "stripes_to_heads",
    "stripes_to_heads_steps",
    "sync_gradients",
    "tokens_to_stripes",
    "tokens_to_stripes_steps",
]
