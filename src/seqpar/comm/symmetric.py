"""Memory that all ranks of a group read and write, and the sum over them that kernels do there.

Between a sum over ranks and the next product stand the residual and a norm. As operators of their own they read and
write the whole activation twice more; on symmetric memory one kernel sums, adds and norms, without a backend's call
(`seqpar.kernels.all_reduce_norm` has the protocol). What takes this memory takes None as well, and then does the same
by the group's own collectives: that is what runs on a CPU, over nodes, and where a gradient is wanted.

There is no "auto": whether GPUs reach each other's memory is found by trying, and whether that is faster than NCCL has
not been measured yet.

Source: TokenWeave, arXiv:2505.11329 (the sum with the norm of a sharded residual); PyTorch's symmetric memory.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.comm.agreement import agree, device_of
from seqpar.comm.allreduce import all_reduce_algorithm
from seqpar.comm.collectives import all_gather_async
from seqpar.comm.differentiable import _plain, all_gather_steps, all_reduce_steps, reduce_scatter_steps
from seqpar.comm.flight import depart
from seqpar.comm.handle import Handle
from seqpar.comm.mesh import describe
from seqpar.comm.record import count
from seqpar.comm.steps import Steps
from seqpar.comm.stream import Launched, current_stream, follow, new_stream, use_stream
from seqpar.comm.wire import Wire
from seqpar.kernels.all_reduce_norm import Arena, ArenaPlan, Shots
from seqpar.kernels.all_reduce_norm import all_reduce_norm as kernel
from seqpar.kernels.dispatch import wants_grad
from seqpar.kernels.rms_norm import add_rms_norm
from seqpar.partition import even_split

__all__ = ["SymmetricMemory", "all_reduce_norm", "all_reduce_norm_steps"]


class SymmetricMemory:
    """Memory on each rank of a group that the kernels of all of them use; every rank makes it with the same arguments.

    Three times `capacity` bytes on every rank, for sums of up to so many. All that use it follow one another, in one
    order on all ranks: layers may share it, two batches at a time may not.

    Args:
        capacity: bytes of the largest tensor that is summed, `T * M * itemsize`.
        group: its ranks, on GPUs that reach each other's memory.
        device: the GPU of this rank.
        blocks: programs of each kernel; as many multiprocessors are busy while it waits for other ranks. Published
            kernels of this kind take 2 to 32.
        overlap: launch on a stream of its own, so that programs that are interleaved compute meanwhile. Otherwise a
            sum takes its place on the stream of its caller, which costs no events.
        multimem: let the switch add and copy (NVLink Switch, from H100 on). Its order of summation is its own, so
            results are no longer those of a deterministic group.

    Raises:
        ValueError: on all ranks where one has other arguments, no GPU, or cannot reach the others'.
    """

    def __init__(
        self,
        capacity: int,
        *,
        group: ProcessGroup,
        device: torch.device | str = "cuda",
        blocks: int = 32,
        overlap: bool = False,
        multimem: bool = False,
    ) -> None:
        self.group, self.device, self.overlap = group, torch.device(device), overlap
        plan = ArenaPlan(group.size(), blocks, capacity)
        agree(self._refusal(plan), group=group)
        self._check_same(plan, multimem)
        own, addresses, multicast = _allocate(plan, group, self.device)
        if multimem and not multicast:
            raise ValueError(
                f"`multimem` must be left out where no switch reaches all GPUs, got True for {describe(group)}"
            )
        self.arena = Arena(
            own,
            torch.tensor(addresses, dtype=torch.int64, device=self.device),
            group.rank(),
            plan,
            multicast if multimem else 0,
        )
        self._stream = new_stream(self.device, priority=-1) if overlap and self.device.type == "cuda" else None

    def _refusal(self, plan: ArenaPlan) -> ValueError | None:
        """What is wrong on this rank, before anything is allocated."""
        try:
            plan.check()
        except ValueError as error:
            return error
        if self.device.type not in _DEVICES:
            return ValueError(
                f'`device` must be a CUDA device, got "{self.device}"; without `memory=` collectives do the same'
            )
        return None

    def _check_same(self, plan: ArenaPlan, multimem: bool) -> None:
        mine = torch.tensor([[plan.blocks, plan.capacity, multimem]], device=device_of(self.group))
        everyone = all_gather_async(mine, group=self.group, label="symmetric memory").wait().tolist()
        if everyone.count(everyone[0]) != len(everyone):
            raise ValueError(
                f"`blocks`, `capacity` and `multimem` must be the same on all ranks of {describe(self.group)}, "
                f"got {', '.join(map(str, everyone))}"
            )

    def launch(
        self,
        x: Float[Tensor, "t m"],
        residual: Float[Tensor, "t_residual m"],
        weight: Float[Tensor, " m"],
        eps: float,
        *,
        shots: Shots,
        label: str = "",
    ) -> tuple[Handle, Tensor]:
        """Launch the sum of `x` with residual and norm: a handle of the norm, and the total, there when that is."""
        op, p, rank = "all_reduce_norm", self.group.size(), self.group.rank()
        own = even_split(len(x), p)[rank] * x.shape[1]
        least = x.numel() + (p - 2) * own if p > 1 else 0
        sent = (p - 1) * x.numel() if shots == "one_shot" else least
        if p > 1:
            count(op, label, least * x.itemsize, sent * x.itemsize)
        flight = depart(op, label, self.group, x, sent * x.itemsize, x.shape)
        launcher = current_stream(x.device)
        with nullcontext() if self._stream is None else use_stream(self._stream):
            if self._stream is not None:
                # [A] behind what computed the arguments; and behind all that has used what this stream allocated for
                # earlier results, so that their memory may be taken again here once they are dropped.
                follow(launcher)
            normed, total = kernel(x, residual, weight, eps, arena=self.arena, shots=shots)
            works = () if self._stream is None else (Launched(x.device),)
        return Handle(op, label, self.group, works, lambda: normed, (x, residual, normed, total), flight), total

    def __repr__(self) -> str:
        plan = self.arena.plan
        return f"SymmetricMemory({plan.capacity} bytes, blocks={plan.blocks}, {describe(self.group)})"


_DEVICES = frozenset({"cuda"})


def _allocate(plan: ArenaPlan, group: ProcessGroup, device: torch.device) -> tuple[Tensor, list[int], int]:
    """This rank's arena, the addresses of all, and the address that stands for all of them or 0."""
    from torch.distributed import _symmetric_memory as symmetric

    error: str | None = None
    try:
        own = symmetric.empty(plan.num_bytes, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)
        shared = symmetric.rendezvous(own, group)
    except RuntimeError as reason:
        error = (
            f"`group` must be of ranks whose GPUs reach each other's memory, got {describe(group)}: "
            f"{str(reason).splitlines()[0]}; without `memory=` collectives do the same"
        )
    agree(error, group=group)  # and nobody signals to an arena that is not zero yet
    return own, list(shared.buffer_ptrs), int(shared.multicast_ptr)


def all_reduce_norm_steps(
    x: Float[Tensor, "t m"],
    residual: Float[Tensor, "t_residual m"],
    weight: Float[Tensor, " m"],
    eps: float,
    *,
    group: ProcessGroup,
    memory: SymmetricMemory | None = None,
    sharded: bool = False,
    label: str = "",
    wire: Wire | None = None,
) -> Steps[tuple[Float[Tensor, "t m"], Float[Tensor, "t_residual m"]]]:
    """The norm of the residual plus the sum of `x` over the ranks, and that total.

    In:    x[T, M]{partial}; residual[T, M], replicated; weight[M]. `sharded`: residual[T/p, M], by `even_split`.
    Out:   the norm [T, M], replicated; the total, placed as the residual.
    Grad:  without `memory` alone: of the norm replicated, as `all_reduce_steps` takes it; partial where `sharded`.
    Comm:  an all-reduce, or where `sharded` a reduce-scatter and an all-gather. With `memory` one kernel of as many
           bytes, in one shot or two by size (`all_reduce_algorithm`), which adds in rank order.

    Args:
        x: this rank's summand.
        residual: what the sum is added to.
        weight: of the norm.
        eps: added to the mean square.
        group: the ranks.
        memory: made for that group; None to use its collectives.
        sharded: the residual is split by tokens, and so is the total: a row is normed by one rank, and its total is
            not sent (TokenWeave).
        label: who asks.
        wire: the format in which the collectives send.

    Raises:
        ValueError: memory of another group, or with it a wire format, a gradient that is wanted, or what
            `kernels.all_reduce_norm` refuses; as the collectives and the norm.
    """
    if memory is not None:
        _check(memory, group, wire, x, residual, weight)
        handle, total = memory.launch(x, residual, weight, eps, shots=_shots(x, group, sharded), label=label)
        return (yield handle), total
    if not sharded:
        summed = yield from all_reduce_steps(x, group=group, label=label, wire=wire)
        return add_rms_norm(residual, summed, weight, eps)
    part = yield from reduce_scatter_steps(x, group=group, label=label, wire=wire)
    normed, total = add_rms_norm(residual, part, weight, eps)
    sizes = even_split(len(x), group.size())
    return (yield from all_gather_steps(normed, group=group, sizes=sizes, label=label, wire=wire)), total


all_reduce_norm = _plain(all_reduce_norm_steps)


def _shots(x: Tensor, group: ProcessGroup, sharded: bool) -> Shots:
    if sharded:
        return "sharded"
    algorithm = all_reduce_algorithm(x.nbytes, group.size(), True, x.device.type)
    return "one_shot" if algorithm == "one_shot" else "two_shot"


def _check(memory: SymmetricMemory, group: ProcessGroup, wire: Wire | None, *tensors: Tensor) -> None:
    """Raise ValueError for what is not done on symmetric memory, which all ranks are asked alike."""
    if memory.group is not group:
        raise ValueError(f"`memory` must be of {describe(group)}, got that of {describe(memory.group)}")
    if wire is not None:
        raise ValueError(f"`wire` must be None with `memory`, which is read as it is, got {wire!r}")
    if wants_grad(*tensors):
        raise ValueError(
            "`x`, `residual` and `weight` must need no gradient with `memory`; use torch.no_grad(), or None"
        )
