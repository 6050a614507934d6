"""The two modules that replace a Transformers model's own: the decoder stack and the head.

`ParallelBackbone` takes what `LlamaModel` takes and returns what it returns. In between there is no padding and no
batch dim: one `RaggedBatch` of the tokens that the mask keeps, sliced over the sequence ranks. Its `steps` are one
program; `stack_steps` is the part of it that a schedule can run once for each chunk of the batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from seqpar import comm
from seqpar.comm import Groups, Steps
from seqpar.hf.attend import CSA, Attend, Home, Path
from seqpar.hf.auto import AutoOverlap, called_whole
from seqpar.hf.cache import CacheSpec, CacheStore, ParallelCache, store_of
from seqpar.hf.padding import Padding, check_windows
from seqpar.hf.shift import AutoShift
from seqpar.kv import PagedKV, StripedKV
from seqpar.layers import (
    ParallelDecoderLayer,
    ParallelLMHead,
    add_layouts,
    gather_rows_steps,
    heads_to_stripes,
    placed_rows,
    stripes_to_heads,
)
from seqpar.partition import HeadMap, Interleave, Layout, Placement, Range, Shift, even_ranges
from seqpar.ragged import RaggedBatch, Tail

__all__ = ["KEEP", "LMHead", "ParallelBackbone"]

KEEP = "seqpar_logits_to_keep"  # how the causal LM's hook hands `logits_to_keep` down
_FOR_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")  # the causal LM passes these to both


@dataclass
class _Output(BaseModelOutputWithPast):
    """What the stack returns; the causal LM of a mixture of experts asks for logits that nobody gathered, too.

    Transformers 5.17 declares tensors of float32 on CPUs where it returns any.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: Any = None  # those not asked for are None
    router_logits: None = None


_USUAL = Path(None, "heads")


class _Plan(NamedTuple):
    """One forward, decided before anything is computed or sent."""

    padding: Padding
    batch: RaggedBatch
    position_ids: Int64[Tensor, "b s"]
    store: CacheStore | None = None
    kv: PagedKV | None = None
    cache: Cache | None = None
    cuts: tuple[int, ...] = ()
    has_tail: bool = False
    layout: Layout | None = None
    path: Path = _USUAL


class _Chunk(NamedTuple):
    """Consecutive tokens of a step, which run as one program.

    `tail` is what the last layer computes of them, `held` the rows of each sequence rank where they are no even slices.
    """

    rows: slice
    batch: RaggedBatch
    tail: Tail | None
    held: tuple[tuple[int, ...], ...] | None

    def find(self, rows: Sequence[int] | None) -> list[int] | None:
        """Where rows of the chunk (None: all) lie among those that the ranks have, one rank after another."""
        if self.held is not None:
            place = {row: place for place, row in enumerate(chain(*self.held))}
            return [place[row] for row in (range(len(place)) if rows is None else rows)]
        if rows is None or self.tail is None:
            return None if rows is None else list(rows)
        return [bisect_left(self.tail.rows, row) for row in rows]


def _chunks(
    batch: RaggedBatch,
    cuts: tuple[int, ...],
    wanted: Sequence[int] | None,
    *,
    placement: Placement | None = None,
    ranks: int = 1,
) -> list[_Chunk]:
    """The chunks of a step; of their last tokens only those from the `wanted` rows on, unless that is None."""
    parts = batch.split(cuts) if cuts else (batch,)
    chunks = []
    for (start, stop), part in zip(pairwise((0, *cuts, batch.num_tokens)), parts, strict=True):
        tail = None if wanted is None else part.tail(row - start for row in wanted if start <= row < stop)
        whole = tail is None or len(tail.rows) == part.num_tokens
        held = None if placement is None else placed_rows(part, ranks, placement)
        chunks.append(_Chunk(slice(start, stop), part, None if whole else tail, held))
    return chunks


class ParallelBackbone(nn.Module):
    """Embedding, decoder layers and final norm over the ranks of a mesh.

    Args:
        config: the model's.
        embed_tokens: takes ids[T/sp].
        layers: take (x, batch, cos, sin, kv).
        norm: the last one.
        rotary_emb: Transformers' own module, so that every rope type is what it is there.
        groups: the ranks.
        heads: who owns which heads.
        head_dim: dims of a head.
        vocab_size: ids that the embedding knows.
        windows: sliding window of each layer.
        sequence_sharded: activations are split over `tp` as well.
        overlap: how large steps are cut into chunks that hide each other's collectives, or who decides that; None for
            not at all.
        shift: which layout a step runs under, or who decides that; None for the stored one always. Its other layouts
            must be added (`add_layouts`).
        attend: which attention a step takes, of those that the layers have (`add_cores`); by default always the usual.
    """

    label: str = ""

    def __init__(
        self,
        config: PretrainedConfig,
        embed_tokens: nn.Module,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        rotary_emb: nn.Module,
        *,
        groups: Groups,
        heads: HeadMap,
        head_dim: int,
        vocab_size: int,
        windows: Sequence[int | None],
        sequence_sharded: bool = False,
        overlap: Interleave | AutoOverlap | None = None,
        shift: Shift | AutoShift | None = None,
        attend: Attend | None = None,
    ) -> None:
        super().__init__()
        self.overlap, self.shift = overlap, shift
        self.attend = Attend(heads=heads, head_dim=head_dim) if attend is None else attend
        self.layouts: dict[Layout | None, Groups] = {None: groups, groups.layout: groups}
        self.config, self.groups, self.heads, self.head_dim = config, groups, heads, head_dim
        self.windows, self.sequence_sharded = tuple(windows), sequence_sharded
        self.vocab_size = vocab_size
        self.embed_tokens, self.layers, self.norm, self.rotary_emb = (
            embed_tokens,
            nn.ModuleList(layers),
            norm,
            rotary_emb,
        )

    def add_layouts(self, layouts: Mapping[Layout, Groups]) -> None:
        """Let steps run under other layouts of the same ranks (`comm.layout_groups`), on views of the stored weights.

        Raises:
            TypeError: the embedding or a layer was replaced by another's, which knows no layouts.
        """
        new = {layout: groups for layout, groups in layouts.items() if layout not in self.layouts}
        add_layouts((self.embed_tokens, *self.layers), new)
        for layout, groups in new.items():
            self.layouts[layout] = groups

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the stack; arguments and result as `LlamaModel.forward`, the same on every rank.

        In:    ids[B, S] or embeddings[B, S, M]; a mask[B, cached + S] of zeros and ones; positions[B, S]; a cache.
        Out:   `last_hidden_state`[B, S, M] and, if asked for, `hidden_states`, replicated; zeros at padding.
        Grad:  replicated in, replicated out; weights need `seqpar.layers.sync_gradients`.
        Comm:  an all-reduce for the embedding, the layers' own, and a gather of the rows that are returned.

        Raises:
            TypeError, ValueError: what cannot be honoured, before anything is computed or cached.
        """
        return_dict = kwargs.pop("return_dict", None)
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        output = comm.run(self.steps(*inputs, **kwargs))
        return output.to_tuple() if return_dict is False else output

    def steps(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Steps[BaseModelOutputWithPast]:
        """See `forward`."""
        keep = kwargs.pop(KEEP, 0)
        wanted = self._wanted(kwargs.pop("output_hidden_states", self.config.output_hidden_states))
        self._check_options(kwargs)
        inputs = (input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)
        plan = self._plan(*inputs, keep if wanted is None else 0)
        tokens = plan.padding.pack(inputs_embeds if input_ids is None else input_ids)  # type: ignore[arg-type]
        everything = plan.padding.all_rows(tokens.device)
        selection = plan.padding.select(keep, tokens.device) if wanted is None else everything
        cos, sin = self._rope(plan)
        wanted_rows = selection.rows if plan.has_tail else None
        place: dict[str, Any] = {"placement": plan.path.placement, "ranks": self.groups.layout.sp}
        chunks = _chunks(plan.batch, plan.cuts, wanted_rows, **place)
        outputs = yield from comm.interleave_steps(
            [
                self.stack_steps(
                    tokens[rows],
                    part,
                    cos[rows],
                    sin[rows],
                    plan.kv,
                    keep_inputs=wanted or (),
                    tail=tail,
                    held=held,
                    layout=plan.layout,
                    core=plan.path.core,
                )
                for rows, part, tail, held in chunks
            ]
        )
        groups = self.layouts[plan.layout]
        collected = yield from self._collect_steps([x for x, _ in outputs], selection.rows, chunks, groups)
        last = selection.unpack(collected)
        states: list[Any] = [None] * (len(self.layers) + 1)
        for index in outputs[0][1]:
            local = [inputs[index] for _, inputs in outputs]
            states[index] = everything.unpack((yield from self._collect_steps(local, None, chunks, groups)))
        if wanted is not None and len(self.layers) in wanted:
            states[-1] = last
        if plan.store is not None:
            plan.store.commit(plan.padding)
        return _Output(
            last_hidden_state=last,
            past_key_values=plan.cache,
            hidden_states=None if wanted is None else tuple(states),
        )

    def stack_steps(
        self,
        tokens: Int64[Tensor, " t"] | Float[Tensor, "t m"],
        batch: RaggedBatch,
        cos: Float[Tensor, "t d"],
        sin: Float[Tensor, "t d"],
        kv: PagedKV | None,
        *,
        keep_inputs: Collection[int] = (),
        tail: Tail | None = None,
        held: Sequence[Sequence[int]] | None = None,
        layout: Layout | None = None,
        core: str | None = None,
    ) -> Steps[tuple[Float[Tensor, "t_out m"], dict[int, Float[Tensor, "t_local m"]]]]:
        """Embed a ragged batch and run it through the layers and the norm: what one chunk of a schedule does.

        In:    tokens, all T of the batch, as ids or as embeddings.
        Out:   this rank's normed tokens (with `tail`, those of them that are in it), and the inputs of the layers
               named in `keep_inputs`. A rank's tokens are those of `layout`, by default of the stored one; or its rows
               in `held`, where `core` places them so.
        """
        x = yield from self._embed_steps(tokens, held, layout)
        inputs: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if index in keep_inputs:
                inputs[index] = x
            options: dict[str, Any] = {} if layout is None else {"layout": layout}
            if core is not None:
                options["core"] = core
            if tail is not None and index + 1 == len(self.layers):
                options["tail"] = tail
            x = yield from comm.call(layer, x, batch, cos, sin, kv, **options)
        return (yield from comm.call(self.norm, x)), inputs

    def ragged_steps(
        self,
        tokens: Int64[Tensor, " t"],
        batch: RaggedBatch,
        kv: PagedKV,
        rows: Sequence[int] | None,
        *,
        has_tail: bool,
        layout: Layout | None,
    ) -> Steps[Float[Tensor, "rows m"]]:
        """Run a step over a cache that the caller keeps: embedding, layers, norm, and a gather of some rows.

        In:    tokens, all T of the batch, replicated.
        Out:   the normed rows, replicated.
        Comm:  as `forward`.

        Args:
            tokens: ids of the batch's tokens.
            batch: the step.
            kv: the cache that gave the batch, of this rank's heads.
            rows: which rows to return, increasing; None for all.
            has_tail: whether the last layer may leave out the others; alike on every rank.
            layout: of the step, by `layout_of`.
        """
        wanted = rows if has_tail else None
        cuts = self._ragged_cuts(batch, None if wanted is None else len(wanted), layout)
        tables = self.rotary_emb(next(self.parameters()), position_ids=batch.positions[None])
        cos, sin = (table[0] for table in tables)
        chunks = _chunks(batch, cuts, wanted)
        outputs = yield from comm.interleave_steps(
            [
                self.stack_steps(tokens[part], chunk, cos[part], sin[part], kv, tail=tail, layout=layout)
                for part, chunk, tail, _ in chunks
            ]
        )
        return (yield from self._collect_steps([x for x, _ in outputs], rows, chunks, self.layouts[layout]))

    def _embed_steps(
        self, tokens: Tensor, held: Sequence[Sequence[int]] | None, layout: Layout | None
    ) -> Steps[Float[Tensor, "t_local m"]]:
        """This rank's tokens of a batch, embedded."""
        groups = self.layouts[layout]
        mine: Any = slice(*even_ranges(len(tokens), groups.layout.sp)[groups.sp.rank()])
        if held is not None:
            mine = torch.tensor(held[groups.sp.rank()], dtype=torch.int64, device=tokens.device)
        if tokens.is_floating_point():
            x = comm.reduce_grad(tokens, group=groups.sp, label=self.label)[mine]
        else:
            options = {} if layout is None else {"layout": layout}
            x = yield from comm.call(self.embed_tokens, tokens[mine], **options)
        if self.sequence_sharded:
            within = even_ranges(len(x), groups.layout.tp)[groups.tp.rank()]
            x = comm.reduce_grad(x, group=groups.tp, label=self.label)[within.start : within.stop]
        return x

    def _collect_steps(
        self, locals_: Sequence[Tensor], rows: Sequence[int] | None, chunks: Sequence[_Chunk], groups: Groups
    ) -> Steps[Float[Tensor, "rows m"]]:
        """Rows of the whole step (None: all), in the order asked for, out of every rank's tokens of every chunk."""
        if len(chunks) == 1:
            return (yield from self._gather_steps(locals_[0], rows, chunks[0], groups))
        parts: list[Tensor] = []
        order: list[int] = []
        for local, chunk in zip(locals_, chunks, strict=True):
            start, stop = chunk.rows.start, chunk.rows.stop
            inside = [i for i, row in enumerate(rows or ()) if start <= row < stop]
            order += inside
            mine = None if rows is None else [rows[i] - start for i in inside]
            parts.append((yield from self._gather_steps(local, mine, chunk, groups)))
        gathered = torch.cat(parts)
        if order == sorted(order):
            return gathered
        return gathered[torch.tensor(order, device=gathered.device).argsort()]

    def _gather_steps(
        self, x: Float[Tensor, "t_local m"], rows: Sequence[int] | None, chunk: _Chunk, groups: Groups
    ) -> Steps[Float[Tensor, "rows m"]]:
        """Rows of a chunk (None: all) out of every rank's tokens; over `tp`, when sharded, all travel."""
        if rows is not None and not rows:
            return x[:0]
        layout, tail = groups.layout, chunk.tail
        slices = even_ranges(chunk.batch.num_tokens, layout.sp)
        held = [mine.size if tail is None else len(tail.within(*mine)) for mine in slices]
        if chunk.held is not None:
            held = [len(mine) for mine in chunk.held]
        if self.sequence_sharded:
            mine = slices[groups.sp.rank()] if chunk.held is None else Range(0, held[groups.sp.rank()])
            shares = [share.shift(mine.start) for share in even_ranges(mine.size, layout.tp)]
            sizes = [share.size if tail is None else len(tail.within(*share)) for share in shares]
            x = yield from comm.all_gather_steps(x, group=groups.tp, sizes=sizes, grad="replicate", label=self.label)
        return (
            yield from gather_rows_steps(
                x, rows=chunk.find(rows), num_tokens=sum(held), sizes=held, group=groups.sp, label=self.label
            )
        )

    def takes_tail(self) -> bool:
        """Whether the last layer may leave out rows that nobody asked for, and no hook on the norm would miss them.

        Comm:  a byte of each rank, since a hook may be on one rank alone.
        """
        last = self.layers[-1] if len(self.layers) else None
        mine = isinstance(last, ParallelDecoderLayer) and last.takes_tail() and not comm.is_wrapped(self.norm)
        takes = torch.tensor([mine], device=next(self.parameters()).device)
        return bool(comm.all_gather(takes, group=self.groups.flat, label="agree").all())

    def _rope(self, plan: _Plan) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"]]:
        """Tables of the batch's tokens, worked out over the padded positions as Transformers does."""
        cos, sin = self.rotary_emb(next(self.parameters()), position_ids=plan.position_ids)
        batch = plan.padding.shape[0]
        return plan.padding.pack(cos.expand(batch, -1, -1)), plan.padding.pack(sin.expand(batch, -1, -1))

    def _plan(
        self,
        input_ids: Any,
        inputs_embeds: Any,
        attention_mask: Any,
        position_ids: Any,
        past_key_values: Any,
        use_cache: bool | None,
        keep: int | Tensor,
    ) -> _Plan:
        """Check a call, lay its tokens out flat and find room for them in the cache."""
        tokens = self._check_tokens(input_ids, inputs_embeds)
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = ParallelCache()
        store = None if past_key_values is None else store_of(past_key_values, len(self.layers))
        seen, history = (0, None) if store is None else (store.seen, store.history)
        gradients = self._wants_gradients(inputs_embeds)
        if gradients and seen:
            raise ValueError(
                f"`past_key_values` must be empty where gradients are wanted, got {seen} cached columns; "
                "use torch.no_grad()"
            )
        if gradients and isinstance(self.attend.prefill, CSA):
            raise ValueError(
                f'`prefill` must be "ring" or "ulysses" where gradients are wanted, got {self.attend.prefill}; '
                "use torch.no_grad()"
            )
        padding = Padding.plan(shape, attention_mask, seen, history)
        if padding.mask is not None or history is not None:
            check_windows(self.windows, attention_mask.cpu().bool())
        places = self._check_positions(position_ids, shape, seen, device)
        if store is None and position_ids is not None and attention_mask is None:
            padding = Padding.packed(shape, places.expand(shape))
        positions = padding.pack(places.expand(shape))
        path = self._path(padding, store)
        wants_tail = path.placement is None and padding.select(keep, torch.device("cpu")).rows is not None
        has_tail = wants_tail and self.takes_tail()
        keep = keep if has_tail else 0
        # Replicated parameters have a gradient under the stored layout alone, and none flows through a cache. Placed
        # tokens lie on the ranks of the stored layout.
        layout = None if gradients or path.placement is not None else self.layout_of(padding)
        cuts = () if gradients else self._cuts(padding, store, keep, layout)
        if store is None and not cuts:
            batch = RaggedBatch.build(padding.q_lens, padding.q_lens, positions=positions, device=device)
            return _Plan(padding, batch, places, has_tail=has_tail, layout=layout, path=path)
        # Chunks see each other's keys in a cache, if only for one step.
        store = CacheStore() if store is None else store
        if any(store.lengths) and path.home != store.home:
            store.move(shape[0], self.cache_spec(store.home), self.cache_spec(path.home), self._move)
        kv, batch = store.begin(padding, positions, self.cache_spec(path.home))
        return _Plan(padding, batch, places, store, kv, past_key_values, cuts, has_tail, layout, path)

    def _path(self, padding: Padding, store: CacheStore | None) -> Path:
        """How a step attends, by its lengths and by where the cache lies."""
        if store is not None and self.attend.stripes:
            store.check_stripes(self.attend.striping)
        cached = (0,) * len(padding.q_lens) if store is None or not store.lengths else store.lengths
        home: Home = "heads" if store is None else store.home
        weight, auto = next(self.parameters()), self.attend.auto

        def measure() -> None:
            assert auto is not None, "called where it is"
            auto.measure(
                self.heads,
                self.head_dim,
                groups=self.groups,
                under=self.layouts[self.layout_of(padding)],
                window=None if None in self.windows else max(window or 0 for window in self.windows),
                dtype=weight.dtype,
                device=weight.device,
            )

        return self.attend.path_of(
            padding.q_lens, cached, home, itemsize=weight.dtype.itemsize, measure=None if auto is None else measure
        )

    def _move(self, source: PagedKV, target: PagedKV, requests: Sequence[Hashable]) -> None:
        """Bring what is cached to where decodes read it.

        Comm:  `heads_to_stripes` or `stripes_to_heads`.
        """
        options: dict[str, Any] = {
            "heads": self.heads,
            "group": self.groups.sp,
            "tp_rank": self.groups.tp.rank(),
            "label": f"{self.label}.move",
        }
        if isinstance(target, StripedKV):
            heads_to_stripes(source, target, requests, **options)
        elif isinstance(source, StripedKV):
            stripes_to_heads(source, target, requests, **options)

    def layout_of(self, step: Padding | RaggedBatch) -> Layout | None:
        """The layout of a step, by its number of tokens alone; None for the stored one."""
        if self.shift is None:
            return None
        if isinstance(self.shift, AutoShift):
            chosen = self.shift.layout_of(
                step.num_tokens,
                self.layers,
                layouts=[layout for layout in self.layouts if layout is not None],
                stored=self.groups.layout,
                group=self.groups.flat,
            )
        else:
            chosen = self.shift.layout_of(step.num_tokens)
        return None if chosen == self.groups.layout else chosen

    def _wants_gradients(self, inputs_embeds: Tensor | None) -> bool:
        """Whether a `backward` may follow; it could not reach the tokens of earlier steps."""
        inputs = () if inputs_embeds is None else (inputs_embeds,)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))

    def _cuts(
        self, padding: Padding, store: CacheStore | None, keep: int | Tensor, layout: Layout | None
    ) -> tuple[int, ...]:
        """Where a step without gradients is cut; rows that hold several sequences each are not, nor are decodes.

        `keep` says of which rows the last layer's output is wanted.
        """
        if self.overlap is None or len(padding.q_lens) != padding.shape[0] or max(padding.q_lens) == 1:
            return ()
        if isinstance(self.overlap, AutoOverlap):
            cached = store.lengths if store is not None and store.lengths else (0,) * len(padding.q_lens)
            rows = padding.select(keep, torch.device("cpu")).rows
            wanted = len(rows) if rows else None
            return self.overlap.cuts_of(
                padding.q_lens, cached, self.layers, group=self.groups.flat, last_rows=wanted, layout=layout
            )
        return self._given_cuts(self.overlap, padding.num_tokens)

    def _ragged_cuts(self, batch: RaggedBatch, wanted: int | None, layout: Layout | None) -> tuple[int, ...]:
        """Where a step is cut whose batch is given; decodes are not. Of the last layer, `wanted` rows are needed."""
        if self.overlap is None or max(batch.q_lens) == 1:
            return ()
        if isinstance(self.overlap, Interleave):
            return self._given_cuts(self.overlap, batch.num_tokens)
        cached = tuple(keys - new for keys, new in zip(batch.kv_lens, batch.q_lens, strict=True))
        return self.overlap.cuts_of(
            batch.q_lens, cached, self.layers, group=self.groups.flat, last_rows=wanted, layout=layout
        )

    def _given_cuts(self, overlap: Interleave, num_tokens: int) -> tuple[int, ...]:
        """The cuts of a step of so many tokens, once all ranks agree that there is something to overlap."""
        cuts = overlap.cuts_of(num_tokens)
        if not cuts:
            return ()
        whole = next(called_whole(self.layers, "layers"), None)
        refusal = (
            f'`overlap` must be "off" while a layer is called as a whole, got hooks or a wrapper on `{whole}`; '
            "remove them, or parallelize without overlap"
        )
        comm.agree(whole and refusal, group=self.groups.flat)  # they may be on one rank alone
        return cuts

    def cache_spec(self, home: Home = "heads") -> CacheSpec:
        """What this rank caches."""
        weight = next(self.parameters())
        common = (self.head_dim, weight.dtype, weight.device)
        if home == "heads":
            return CacheSpec(len(self.layers), self.heads.kv_ranges[self.groups.flat.rank()].size, *common)
        shard, rank = self.heads.kv_shard(self.groups.tp.rank()).size, self.groups.sp.rank()
        return CacheSpec(len(self.layers), shard, *common, self.attend.striping, rank)

    def _check_tokens(self, input_ids: Any, inputs_embeds: Any) -> Tensor:
        """The one of the two that is given, after checking dims and dtype."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given, got both or neither")
        name, tokens, dims = "input_ids", input_ids, 2
        if inputs_embeds is not None:
            name, tokens, dims = "inputs_embeds", inputs_embeds, 3
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() != (dims == 3) or tokens.is_complex():
            raise TypeError(
                f"`{name}` must be {'an integer' if dims == 2 else 'a floating-point'} tensor, "
                f"got {tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__}"
            )
        expected = "[B, S]" if dims == 2 else f"[B, S, {self.config.hidden_size}]"
        if tokens.dim() != dims or (dims == 3 and tokens.shape[2] != self.config.hidden_size):
            raise ValueError(f"`{name}` must have shape {expected}, got {list(tokens.shape)}")
        if dims == 2 and tokens.is_cpu and tokens.numel():
            # On every rank alike: the embedding would check this rank's tokens only. On CUDA it would wait for the GPU.
            low, high = (int(bound) for bound in torch.aminmax(tokens))
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"`input_ids` must lie in [0, {self.vocab_size}), got values in [{low}, {high}]")
        return tokens

    @staticmethod
    def _check_positions(
        position_ids: Any, shape: tuple[int, int], seen: int, device: torch.device
    ) -> Int64[Tensor, "b s"]:
        """Rotary positions [1 or B, S]; by default they count the columns, padding included, as Transformers does."""
        if position_ids is None:
            return torch.arange(seen, seen + shape[1], device=device)[None]
        if not isinstance(position_ids, Tensor) or position_ids.is_floating_point():
            raise TypeError(f"`position_ids` must be an integer tensor, got {type(position_ids).__name__}")
        if position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
            raise ValueError(f"`position_ids` must have shape {list(shape)}, got {list(position_ids.shape)}")
        return position_ids.long()

    def _wanted(self, output_hidden_states: Any) -> frozenset[int] | None:
        """Indices of the hidden states asked for, counted as Transformers does; None for none."""
        if not output_hidden_states:
            return None
        count = len(self.layers) + 1
        if output_hidden_states is True:
            return frozenset(range(count))
        chosen = [output_hidden_states] if isinstance(output_hidden_states, int) else list(output_hidden_states)
        return frozenset(index % count for index in chosen if -count <= index < count)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse what this stack does not do."""
        config = self.config
        if options.pop("output_attentions", config.output_attentions):
            raise ValueError("`output_attentions` must be False: attention weights are never formed, got True")
        if not options.pop("is_causal", getattr(config, "is_causal", True)):
            raise ValueError("`is_causal` must be True, got False")
        if self.training and config.attention_dropout:
            raise ValueError(
                f"`attention_dropout` must be 0 in training, got {config.attention_dropout}; set it so or call eval()"
            )
        for name, value in options.items():
            if value is not None and value is not False and name not in _FOR_THE_LOSS:
                raise TypeError(f"`{name}` must not be given to a parallelized model, got {type(value).__name__}")


class LMHead(ParallelLMHead):
    """A `ParallelLMHead` that takes [..., M], as Transformers calls its head."""

    def forward(self, x: Float[Tensor, "*rows m"], **kwargs: Any) -> Float[Tensor, "*rows v"]:
        logits = super().forward(x.flatten(0, -2), **kwargs)
        return logits.view(*x.shape[:-1], logits.shape[-1])
