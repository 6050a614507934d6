"""Token embedding and LM head, sharded by vocabulary; the vocabulary need not divide.

The embedding is split over `tp` (each sequence rank looks up its own tokens), the head over all ranks. The flat map of
`seqpar.partition` makes the head's rows a block of the embedding's, so that tied weights stay one tensor and no layout
moves them.

Source: Megatron-LM (arXiv:1909.08053) for the masked lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqpar import comm, kernels
from seqpar.comm import Groups, ProcessGroup, Steps
from seqpar.layers.base import ShardedModule, Source, check_new, check_view, find_layout
from seqpar.partition import Layout, Piece, Range, even_ranges, even_split, shard_range

__all__ = ["ParallelLMHead", "VocabParallelEmbedding", "gather_rows", "gather_rows_steps"]


class _Rows(NamedTuple):
    """The vocabulary that this rank looks up in one layout, and with whom."""

    group: ProcessGroup
    vocab: Range


class VocabParallelEmbedding(ShardedModule):
    """An embedding whose rows are split over the group.

    Args:
        num_embeddings: V; it need not divide.
        embedding_dim: M.
        group: the tensor-parallel ranks.
        sp: flat blocks in this shard.
        padding_idx: a row that takes no gradient.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: ProcessGroup,
        sp: int = 1,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_new(dtype, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"`padding_idx` must be one of {num_embeddings} rows, got {padding_idx}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.group, self.layout = group, Layout(group.size(), sp).check()
        self.rows = shard_range(num_embeddings, self.layout, group.rank())
        self.layouts: dict[Layout | None, _Rows] = {}
        self.layouts[None] = self.layouts[self.layout] = _Rows(group, self.rows)
        self.weight = nn.Parameter(torch.empty(self.rows.size, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def add_layout(self, layout: Layout, *, group: ProcessGroup) -> None:
        """Make `steps(ids, layout=layout)` available over `group`, on a view of the stored rows.

        Raises:
            ValueError: the stored rows do not contain that layout's, or `group` has another size than its tp.
        """
        check_view(self.layout, self.group.rank(), layout, group)
        self.layouts[layout] = _Rows(group, shard_range(self.num_embeddings, layout, group.rank()))

    @classmethod
    def from_module(cls, embedding: nn.Embedding, *, group: ProcessGroup, sp: int = 1) -> VocabParallelEmbedding:
        """Slice an ordinary embedding; every rank passes the same one.

        Raises:
            ValueError: it renormalises its rows, or scales or sparsifies its gradient.
        """
        weight = embedding.weight
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError(f"`embedding` must have no max_norm, scale_grad_by_freq or sparse, got {embedding}")
        new = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            group=group,
            sp=sp,
            padding_idx=embedding.padding_idx,
            device="meta",
            dtype=weight.dtype,
        )
        new.load_unsharded({"weight": weight})
        new.weight.requires_grad_(weight.requires_grad)
        return new

    @property
    def shard_group(self) -> ProcessGroup:
        return self.group

    def reset_parameters(self) -> None:
        """Draw what `nn.Embedding` would from the same random state, and slice it."""
        if not self.weight.is_meta:
            full = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.weight.dtype)
            nn.init.normal_(full)
            if self.padding_idx is not None:
                full[self.padding_idx].zero_()
            self.load_source("weight", full.to(self.weight.device))

    def steps(self, ids: Int[Tensor, " t"], *, layout: Layout | None = None) -> Steps[Float[Tensor, "t m"]]:
        """See `forward`; yields once, at the all-reduce."""
        rows = find_layout(self.layouts, layout)
        _check_ids(ids, self.num_embeddings)
        return (yield from comm.all_reduce_steps(self._lookup(ids, rows), group=rows.group, label=self.label))

    def forward(self, ids: Int[Tensor, " t"], *, layout: Layout | None = None) -> Float[Tensor, "t m"]:
        """Look up tokens.

        In:    ids[T], replicated over the group, in [0, V).
        Out:   [T, M], replicated.
        Grad:  of the weight: this rank's rows (partial over `sp` until `sync_gradients`).
        Comm:  an all-reduce of T*M elements, exact because all but one addend is zero.

        Args:
            ids: the tokens.
            layout: one that `add_layout` recorded; the stored one by default.

        Raises:
            ValueError: an id out of range (on CUDA a device-side assertion, without a host synchronisation); a layout
                that was not added.
        """
        return comm.run(self.steps(ids, layout=layout))

    def weights(self, layout: Layout) -> list[Tensor]:
        return [self._view(find_layout(self.layouts, layout).vocab)]

    def _view(self, vocab: Range) -> Tensor:
        """The stored rows of a range of the vocabulary."""
        return self.weight[slice(*vocab.shift(-self.rows.start))]

    def _lookup(self, ids: Tensor, rows: _Rows) -> Tensor:
        """The rows of the ids that this rank owns, zeros for the others."""
        if rows.group.size() == 1:
            return F.embedding(ids, self.weight, self.padding_idx)
        own = rows.vocab
        weight = self._view(own)
        if not own.size:
            return weight.new_zeros(ids.shape[0], self.embedding_dim) + 0 * weight.sum()
        local = ids - own.start
        owned = (local >= 0) & (local < own.size)
        padding = None
        if self.padding_idx is not None and own.start <= self.padding_idx < own.stop:
            padding = self.padding_idx - own.start
        found = F.embedding(local.where(owned, 0), weight, padding)
        return found.where(owned[:, None], 0)

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        rows = shard_range(self.num_embeddings, self.layout, self.group.rank() if rank is None else rank)
        piece = (Piece(0, Range(0, rows.size), rows),)
        return {"weight": Source((self.num_embeddings, self.embedding_dim), "weight", piece)}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={tuple(self.rows)}"


class ParallelLMHead(ShardedModule):
    """The output projection, its vocabulary rows split over all ranks of the mesh.

    Args:
        in_features: M.
        vocab_size: V; it need not divide.
        group: all tp x sp ranks in flat order (`Groups.flat`).
        seq_group: the sequence ranks, over which `rows` are gathered (`Groups.sp`).
        bias: whether there is one.
        embedding: the embedding whose weight this head shares; it then has no parameters of its own.
    """

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        *,
        group: ProcessGroup,
        seq_group: ProcessGroup,
        bias: bool = False,
        embedding: VocabParallelEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_new(dtype, in_features=in_features, vocab_size=vocab_size)
        self.in_features, self.vocab_size, self.group, self.seq_group = in_features, vocab_size, group, seq_group
        self.rows = even_ranges(vocab_size, group.size())[group.rank()]
        self._tied: tuple[VocabParallelEmbedding, ...] = ()  # a tuple, so that it is not registered as a child
        self.weight: nn.Parameter | None = None
        if embedding is None:
            self.weight = nn.Parameter(torch.empty(self.rows.size, in_features, device=device, dtype=dtype))
        else:
            if not (embedding.rows.start <= self.rows.start and self.rows.stop <= embedding.rows.stop):
                raise ValueError(f"`embedding` must store rows {tuple(self.rows)}, got {tuple(embedding.rows)}")
            self._tied = (embedding,)
        self.bias = nn.Parameter(torch.empty(self.rows.size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, groups: Groups) -> ParallelLMHead:
        """Slice an ordinary linear layer; every rank passes the same one."""
        new = cls(
            linear.in_features,
            linear.out_features,
            group=groups.flat,
            seq_group=groups.sp,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        new.load_unsharded({"weight": linear.weight, "bias": linear.bias})
        for param in new.parameters():
            param.requires_grad_(linear.weight.requires_grad)
        return new

    @classmethod
    def tied(cls, embedding: VocabParallelEmbedding, *, groups: Groups) -> ParallelLMHead:
        """A head that uses a block of the embedding's rows and stores nothing."""
        return cls(
            embedding.embedding_dim,
            embedding.num_embeddings,
            group=groups.flat,
            seq_group=groups.sp,
            embedding=embedding,
        )

    def weight_rows(self) -> Tensor:
        """This rank's rows: its own parameter, or a view of the tied embedding's."""
        if self.weight is not None:
            return self.weight
        (embedding,) = self._tied
        rows = self.rows.shift(-embedding.rows.start)
        return embedding.weight[rows.start : rows.stop]

    @property
    def shard_group(self) -> ProcessGroup:
        return self.group

    def aliases(self) -> dict[str, ShardedModule]:
        return {} if self.weight is not None else {"weight": self._tied[0]}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is None:
            rows = self.weight_rows()
            destination[prefix + "weight"] = rows if keep_vars else rows.detach()

    def reset_parameters(self) -> None:
        """Draw what `nn.Linear` would from the same random state, and slice it."""
        bound = self.in_features**-0.5
        for name, source in self.sources().items():
            param = self._parameter(source.param)
            if not param.is_meta:
                full = torch.empty(source.shape, dtype=param.dtype, device=param.device)
                self.load_source(name, nn.init.uniform_(full, -bound, bound))

    def steps(
        self, x: Float[Tensor, "t m"], *, rows: Sequence[int] | None = None, num_tokens: int | None = None
    ) -> Steps[Float[Tensor, "rows v"]]:
        """See `forward`; yields at the gather of `rows` and at the gather of the logits."""
        weight = self.weight_rows()
        comm.refuse_dtensor(x, "x")
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"`x` must have shape [T, {self.in_features}], got {list(x.shape)}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"`x` must have the layer's dtype ({weight.dtype}), got {x.dtype}")
        if rows is not None:
            tokens = x.shape[0] if num_tokens is None else num_tokens
            x = yield from gather_rows_steps(x, rows=rows, num_tokens=tokens, group=self.seq_group, label=self.label)
        logits = kernels.linear(comm.reduce_grad(x, group=self.group, label=self.label), weight, self.bias)
        sizes = even_split(self.vocab_size, self.group.size())
        return (
            yield from comm.all_gather_steps(
                logits, group=self.group, dim=1, sizes=sizes, grad="replicate", label=self.label
            )
        )

    def forward(
        self, x: Float[Tensor, "t m"], *, rows: Sequence[int] | None = None, num_tokens: int | None = None
    ) -> Float[Tensor, "rows v"]:
        """Logits of the given tokens.

        In:    x[R, M], replicated; or, with `rows`, x[T/p, M] sharded by tokens over `seq_group`.
        Out:   [R, V], replicated over the group; R = len(rows).
        Grad:  of `x`: placed as `x` is. Of the weight: this rank's rows, whole (nothing to sync).
        Comm:  an all-gather of R*V elements over the group; with `rows` also one of R*M over `seq_group`.

        Args:
            x: activations.
            rows: global indices of the tokens asked for; others' activations and logits travel nowhere.
            num_tokens: T, where `rows` are given.
        """
        return comm.run(self.steps(x, rows=rows, num_tokens=num_tokens))

    def gradient_groups(self, param: str, groups: Groups) -> tuple[ProcessGroup, ...]:
        return ()

    def sources(self, rank: int | None = None) -> dict[str, Source]:
        flat = Layout(self.group.size(), 1)
        rows = shard_range(self.vocab_size, flat, self.group.rank() if rank is None else rank)
        piece = (Piece(0, Range(0, rows.size), rows),)
        found: dict[str, Source] = {}
        if self.weight is not None:
            found["weight"] = Source((self.vocab_size, self.in_features), "weight", piece)
        if self.bias is not None:
            found["bias"] = Source((self.vocab_size,), "bias", piece)
        return found

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.vocab_size}, rows={tuple(self.rows)}, tied={self.weight is None}"


def gather_rows_steps(
    x: Float[Tensor, "t_local m"],
    *,
    rows: Sequence[int] | None = None,
    num_tokens: int,
    group: ProcessGroup,
    sizes: Sequence[int] | None = None,
    label: str = "",
) -> Steps[Float[Tensor, "rows m"]]:
    """See `gather_rows`; yields once."""
    ends = tuple(accumulate(even_split(num_tokens, group.size()) if sizes is None else sizes))
    if len(ends) != group.size() or ends[-1] != num_tokens:
        raise ValueError(f"`sizes` must share {num_tokens} tokens out to {group.size()} ranks, got {list(sizes or ())}")
    slices = [Range(a, b) for a, b in pairwise((0, *ends))]
    if rows is None:
        sizes = [tokens.size for tokens in slices]
        return (yield from comm.all_gather_steps(x, group=group, sizes=sizes, grad="replicate", label=label))
    bad = [row for row in rows if not 0 <= row < num_tokens]
    if bad:
        raise ValueError(f"`rows` must lie in [0, {num_tokens}), got {bad[:3]}")
    owned = [[i for i, row in enumerate(rows) if tokens.start <= row < tokens.stop] for tokens in slices]
    mine, start = owned[group.rank()], slices[group.rank()].start
    local = x[torch.tensor([rows[i] - start for i in mine], dtype=torch.long, device=x.device)]
    sizes = [len(indices) for indices in owned]
    gathered = yield from comm.all_gather_steps(local, group=group, sizes=sizes, grad="replicate", label=label)
    order = [i for indices in owned for i in indices]
    if order == sorted(order):
        return gathered
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return gathered[torch.tensor(inverse, dtype=torch.long, device=x.device)]


def gather_rows(
    x: Float[Tensor, "t_local m"],
    *,
    rows: Sequence[int] | None = None,
    num_tokens: int,
    group: ProcessGroup,
    sizes: Sequence[int] | None = None,
    label: str = "",
) -> Float[Tensor, "rows m"]:
    """Collect some tokens of a sequence-sharded tensor on every rank.

    In:    x[T/p, M], sharded by `even_ranges(T, p)`, or rank r has `sizes[r]`.
    Out:   [R, M], replicated, in the order of `rows` (all T tokens where `rows` is None).
    Grad:  the rows' gradient, replicated in, sharded out; no communication.
    Comm:  each rank sends the rows it owns to every other.

    Raises:
        ValueError: a row outside [0, T), `sizes` that do not add up.
    """
    return comm.run(gather_rows_steps(x, rows=rows, num_tokens=num_tokens, group=group, sizes=sizes, label=label))


def _check_ids(ids: Tensor, num_embeddings: int) -> None:
    comm.refuse_dtensor(ids, "ids")
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`ids` must be an integer tensor of shape [T], got {ids.dtype} {list(ids.shape)}")
    if not ids.numel():
        return
    if ids.device.type == "cpu":
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= num_embeddings:
            raise ValueError(f"`ids` must lie in [0, {num_embeddings}), got values in [{low}, {high}]")
    else:
        torch._assert_async(((ids >= 0) & (ids < num_embeddings)).all())
