"""Communication: meshes and groups, collectives in flight, reshards, schedules, counts, traces, simulated links.

The only part of seqpar that imports `torch.distributed`.
"""

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from seqpar.comm.agreement import agree
from seqpar.comm.allreduce import Algorithm, all_reduce_algorithm
from seqpar.comm.backends import backends
from seqpar.comm.check import check
from seqpar.comm.collectives import (
    all_gather_async,
    all_reduce_async,
    all_to_all_async,
    broadcast_async,
    recv_async,
    reduce_scatter_async,
    send_async,
    send_recv_async,
)
from seqpar.comm.differentiable import (
    all_gather,
    all_gather_steps,
    all_reduce,
    all_reduce_steps,
    all_to_all,
    all_to_all_steps,
    broadcast,
    broadcast_steps,
    recv,
    recv_steps,
    reduce_grad,
    reduce_scatter,
    reduce_scatter_steps,
    send,
    send_recv,
    send_recv_steps,
    send_steps,
)
from seqpar.comm.dtensor import is_dtensor, on_shards, on_whole, refuse_dtensor
from seqpar.comm.failure import CommError
from seqpar.comm.graphs import StepGraphs
from seqpar.comm.handle import Handle, Mark
from seqpar.comm.intervals import Interval
from seqpar.comm.link import LINK_PRESETS, LinkCosts, SimulatedLink
from seqpar.comm.mesh import (
    Groups,
    SplitGroups,
    Stages,
    describe,
    groups,
    init_mesh,
    is_deterministic,
    layout_groups,
    split_groups,
    stages,
)
from seqpar.comm.record import Count, Recorder, record
from seqpar.comm.replay import check_schedule
from seqpar.comm.report import Exposure, TraceReport, TraceSlot
from seqpar.comm.reshard import heads_to_seq, heads_to_seq_steps, seq_to_heads, seq_to_heads_steps
from seqpar.comm.schedule import interleave, interleave_steps
from seqpar.comm.steps import Steps, call, is_wrapped, run, splits, start
from seqpar.comm.symmetric import SymmetricMemory, all_reduce_norm, all_reduce_norm_steps
from seqpar.comm.trace import Trace, trace
from seqpar.comm.wire import Wire

__all__ = [
    "LINK_PRESETS",
    "Algorithm",
    "CommError",
    "Count",
    "DeviceMesh",
    "Exposure",
    "Groups",
    "Handle",
    "Interval",
    "LinkCosts",
    "Mark",
    "ProcessGroup",
    "Recorder",
    "SimulatedLink",
    "SplitGroups",
    "Stages",
    "StepGraphs",
    "Steps",
    "SymmetricMemory",
    "Trace",
    "TraceReport",
    "TraceSlot",
    "Wire",
    "agree",
    "all_gather",
    "all_gather_async",
    "all_gather_steps",
    "all_reduce",
    "all_reduce_algorithm",
    "all_reduce_async",
    "all_reduce_norm",
    "all_reduce_norm_steps",
    "all_reduce_steps",
    "all_to_all",
    "all_to_all_async",
    "all_to_all_steps",
    "backends",
    "broadcast",
    "broadcast_async",
    "broadcast_steps",
    "call",
    "check",
    "check_schedule",
    "describe",
    "groups",
    "heads_to_seq",
    "heads_to_seq_steps",
    "init_mesh",
    "interleave",
    "interleave_steps",
    "is_deterministic",
    "is_dtensor",
    "is_wrapped",
    "layout_groups",
    "on_shards",
    "on_whole",
    "record",
    "recv",
    "recv_async",
    "recv_steps",
    "reduce_grad",
    "reduce_scatter",
    "reduce_scatter_async",
    "reduce_scatter_steps",
    "refuse_dtensor",
    "run",
    "send",
    "send_async",
    "send_recv",
    "send_recv_async",
    "send_recv_steps",
    "send_steps",
    "seq_to_heads",
    "seq_to_heads_steps",
    "split_groups",
    "splits",
    "stages",
    "start",
    "trace",
]
