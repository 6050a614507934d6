"""Keys and values at a certified precision: what a sender tells of its tokens, and what a receiver makes of it.

No collective is launched here: messages are bytes, so one process can play all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Float64, Int8, Int32, Int64, UInt8
from torch import Tensor

from seqpar.kernels import RopeConfig, bitplanes, rope_table
from seqpar.layers.csa.cut import positions_of
from seqpar.partition import Range, RingOrder, Run

BLOCK = 64
NOWHERE = 1 << 62
"""The position of a place in a block where no token is."""
NOTHING = -64
"""The level of such a place."""
RIDGE = 0.02


class Layout(NamedTuple):
    """The keys of a rank in blocks, request after request; the last block of a request may be short."""

    rows: Int64[Tensor, "b m"]
    positions: Int64[Tensor, "b m"]
    request: Int64[Tensor, " b"]

    @property
    def valid(self) -> Bool[Tensor, "b m"]:
        return self.positions < NOWHERE

    def take(self, blocks: Int64[Tensor, " k"]) -> Layout:
        return Layout(*(part[blocks] for part in self))


def lay_out(held: Sequence[Sequence[Run]], device: torch.device) -> Layout:
    rows, positions, owners, first = [], [], [], 0
    for request, runs in enumerate(held):
        where = positions_of(runs)
        blocks = -(-len(where) // BLOCK)
        index = torch.arange(blocks * BLOCK)
        there = index < len(where)
        rows.append((first + index).where(there, 0).view(blocks, BLOCK))
        positions.append(torch.cat([where, torch.full((len(index) - len(where),), NOWHERE)]).view(blocks, BLOCK))
        owners.append(torch.full((blocks,), request))
        first += len(where)
    return Layout(*(torch.cat(parts).to(device) for parts in (rows, positions, owners)))


def seen_blocks(order: RingOrder, receiver: int, owner: int, layout: Layout) -> Int64[Tensor, " k"]:
    """Which of the owner's blocks hold a key that some query of the receiver sees; none of its own."""
    if receiver == owner:
        return layout.request[:0]
    found = []
    for request, runs in enumerate(order.q[receiver]):
        queries, blocks = positions_of(runs).sort().values, (layout.request.cpu() == request).nonzero()[:, 0]
        keys = layout.positions.cpu()[blocks]
        after = torch.searchsorted(queries, keys)
        seen = (after < len(queries)) & (keys < NOWHERE)
        if order.window is not None and len(queries):
            seen &= queries[after.clamp(max=len(queries) - 1)] - keys < order.window
        found.append(blocks[seen.any(1)])
    return torch.cat([layout.request[:0].cpu(), *found]).to(layout.request.device)


class Basis(NamedTuple):
    """Rows that span keys (or values): x = coordinates @ rows. As sent: int8 and a scale for each row."""

    codes: Int8[Tensor, "c d d"]
    scales: BFloat16[Tensor, "c d"]

    @property
    def rows(self) -> Float64[Tensor, "c d d"]:
        return self.codes.double() * self.scales.double()[..., None]

    @classmethod
    def unit(cls, streams: int, size: int, device: torch.device) -> Basis:
        """Channels as they are."""
        one = torch.eye(size, dtype=torch.int8, device=device).expand(streams, -1, -1)
        return cls(one, torch.ones(streams, size, dtype=torch.bfloat16, device=device))

    def take(self, heads: Range) -> Basis:
        """That of some KV heads."""
        which = [*range(*heads), *range(*heads.shift(len(self.codes) // 2))]
        return Basis(self.codes[which], self.scales[which])

    @staticmethod
    def num_bytes(streams: int, size: int) -> int:
        return streams * size * (size + 2)

    @property
    def data(self) -> UInt8[Tensor, " bytes"]:
        """As it is sent."""
        return torch.cat([as_bytes(part) for part in self])

    @classmethod
    def read(cls, data: UInt8[Tensor, " bytes"], streams: int, size: int) -> Basis:
        codes, scales = data.split([streams * size * size, 2 * streams * size])
        return cls(
            as_type(codes, torch.int8).view(streams, size, size), as_type(scales, torch.bfloat16).view(streams, size)
        )


def basis_of(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, turn: Turn, kv_head_of: Sequence[int], softmax_scale: float
) -> Basis:
    """Coordinates without correlation: of keys in units of logits of a typical query, of values in the largest's norm.

    Any basis is right, a good one is short; so that of one rank's tokens serves all ranks.
    """
    heads = k.shape[1]
    keys = turn.back(k.double(), position)
    found = []
    for head in range(heads):
        mine = [i for i, kv in enumerate(kv_head_of) if kv == head]
        asked = q[:, mine].flatten(0, 1).double() * softmax_scale
        found.append(_key_rows(turn.averaged(asked.T @ asked / max(len(asked), 1)), keys[:, head]))
    found += [_value_rows(v[:, head].double()) for head in range(heads)]
    rows = torch.stack(found)
    scales = bitplanes.round_up(rows.abs().amax(-1) / 127)
    codes = (rows / scales.double()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Basis(codes, scales)


def _key_rows(asked: Tensor, k: Tensor) -> Tensor:
    unit = torch.eye(len(asked), dtype=asked.dtype, device=asked.device)
    asked = asked + RIDGE * asked.trace() / len(asked) * unit
    if len(k) < 2 or not (asked.isfinite().all() and k.isfinite().all() and asked.trace() > 0):
        return unit
    values, vectors = torch.linalg.eigh(asked)
    root, back = (vectors * power @ vectors.T for power in (values.sqrt(), values.rsqrt()))
    spread: Tensor = torch.linalg.eigh(root @ k.T.cov() @ root)[1]
    found: Tensor = spread.T @ back
    return found


def _value_rows(v: Tensor) -> Tensor:
    unit = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    largest = v.norm(dim=-1).amax() if len(v) > 1 else v.new_zeros(())
    if not largest.isfinite() or largest == 0:
        return unit
    spread: Tensor = torch.linalg.eigh(v.T.cov())[1]
    return spread.T * largest


class Turn:
    """The rotary embedding of keys, undone before they are coded and done again where they are read.

    Pairs of channels turn by the token's position, and so a pair's norm stays: a metric that weighs both channels of a
    pair alike is the same for every token. Keys that have not been turned repeat themselves more.
    """

    def __init__(self, rope: RopeConfig | None, last: int, device: torch.device) -> None:
        self.table: tuple[Tensor, Tensor] | None = None
        if rope is not None:
            cos, sin = (x.double() for x in rope_table(rope, torch.arange(last, device=device)))
            size = torch.hypot(cos, sin)  # some kinds of tables scale, too
            self.table = cos / size, sin / size

    def to(self, x: Float64[Tensor, "*n g d"], position: Int64[Tensor, "*n"]) -> Float64[Tensor, "*n g d"]:
        return x if self.table is None else self._turned(x, position, 1)

    def back(self, x: Float64[Tensor, "*n g d"], position: Int64[Tensor, "*n"]) -> Float64[Tensor, "*n g d"]:
        return x if self.table is None else self._turned(x, position, -1)

    def averaged(self, square: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
        """A metric over all turns."""
        return square if self.table is None else self._pairs(square.diagonal()).diag()

    def reach(self, q: Float64[Tensor, "t h d"], rows: Float64[Tensor, "h d d"]) -> Float64[Tensor, "t h"]:
        """The largest norm of rows @ q over all turns of q."""
        if self.table is None:
            turned: Tensor = torch.einsum("thd,hcd->thc", q, rows).norm(dim=-1)
            return turned
        weights = self._pairs(rows.square().sum(1)).sqrt()  # |rows @ t| <= |rows / weights| |weights * t| for any t
        most = torch.linalg.matrix_norm(rows / weights[:, None], ord=2)
        found: Tensor = torch.linalg.vector_norm(q * weights, dim=-1) * most
        return found

    def _turned(self, x: Tensor, position: Tensor, sign: int) -> Tensor:
        assert self.table is not None
        cos, sin = (part[position.clamp(max=len(part) - 1)].unsqueeze(-2) for part in self.table)
        size = cos.shape[-1]
        own, rest = x[..., :size], x[..., size:]
        a, b = own.chunk(2, -1)
        return torch.cat([own * cos + sign * torch.cat([-b, a], -1) * sin, rest], -1)

    def _pairs(self, squares: Tensor) -> Tensor:
        """The mean of both channels of a pair."""
        assert self.table is not None
        size = self.table[0].shape[-1]
        own = squares[..., :size].unflatten(-1, (2, -1)).mean(-2)
        return torch.cat([own, own, squares[..., size:]], -1)


class Sender:
    """What a rank tells of its keys and values; every receiver has its own levels."""

    def __init__(self, k: Tensor, v: Tensor, layout: Layout, basis: Basis, turn: Turn) -> None:
        self.valid = layout.valid
        keys, values = k.double()[layout.rows], v.double()[layout.rows]
        exact = torch.cat([turn.back(keys, layout.positions), values], 2).permute(2, 0, 1, 3)  # [c, b, m, d]
        self.rows = basis.rows[:, None]
        self.x = torch.linalg.solve(self.rows, exact, left=False)
        self.boxes = bitplanes.fit(self.x, self.valid)
        self.codes = bitplanes.encode(self.x, self.boxes)
        norms = exact[k.shape[1] :].norm(dim=-1).masked_fill(~self.valid, 0).amax(-1)
        self.peaks = _round_down(norms)

    def start(self, blocks: Tensor, first: tuple[int, int]) -> Int32[Tensor, "c k m"]:
        """The levels of the first bits."""
        return first_levels(self.valid[blocks], len(self.x), first)

    def boxes_for(self, blocks: Tensor) -> Tensor:
        """The first message to a receiver that needs these blocks."""
        if not len(blocks):
            return torch.empty(0, dtype=torch.uint8, device=blocks.device)
        return torch.cat([as_bytes(part) for part in (*_some(self.boxes, blocks), self.peaks[:, blocks])])

    def planes_for(self, blocks: Tensor, have: Tensor, want: Tensor) -> Tensor:
        """The bits from one level to another, and the residuals' norms at that."""
        if not len(blocks):
            return torch.empty(0, dtype=torch.uint8, device=blocks.device)
        boxes, codes = _some(self.boxes, blocks), self.codes[:, blocks]
        held = bitplanes.planes(boxes, want)
        packed = bitplanes.pack(codes, bitplanes.planes(boxes, have), held)
        known = codes & ~((1 << bitplanes.PLANES - held) - 1)
        lost = self.x[:, blocks] - bitplanes.decode(known, held, boxes)
        values = len(self.x) // 2
        lost[values:] = lost[values:] @ self.rows[values:]
        valid = self.valid[blocks]
        norms = bitplanes.radii(lost, want, valid)
        span = bitplanes.radii(lost.flatten(1, 2)[:, None], want.flatten(1)[:, None], valid.flatten()[None])[1]
        return torch.cat([packed, as_bytes(norms), as_bytes(span)])


class Source:
    """What a receiver knows of another rank's keys and values."""

    def __init__(
        self, layout: Layout, blocks: Tensor, basis: Basis, turn: Turn, first: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.blocks, self.basis, self.turn, self.dtype = blocks, basis, turn, dtype
        self.valid, self.positions = layout.valid[blocks], layout.positions[blocks]
        self.request = layout.request[blocks]
        streams = len(basis.codes)
        self.shape = (streams, len(blocks), BLOCK, basis.codes.shape[-1])
        self.level = torch.full(self.shape[:3], NOTHING, dtype=torch.int32, device=blocks.device)
        self.first = first_levels(self.valid, streams, first)
        self.codes = torch.zeros(self.shape, dtype=torch.int32, device=blocks.device)
        self.norms = torch.zeros(3, *self.shape[:2], dtype=torch.bfloat16, device=blocks.device)

    @property
    def _norm_bytes(self) -> int:
        streams, blocks = self.shape[:2]
        return streams * (4 * blocks + 2)

    @property
    def header_bytes(self) -> int:
        streams, blocks, _, size = self.shape
        return 2 * streams * size + blocks * (2 * streams * size + streams) if blocks else 0

    def read_boxes(self, data: Tensor) -> None:
        streams, blocks, _, size = self.shape
        if not blocks:
            data = data.new_zeros(2 * streams * size)
        unit, low, width, peaks = data.split(
            [2 * streams * size, blocks * streams * size, blocks * streams * size, blocks * streams]
        )
        self.boxes = bitplanes.Boxes(
            as_type(unit, torch.bfloat16).view(streams, size),
            as_type(low, torch.int8).view(streams, blocks, size),
            width.view(streams, blocks, size),
        )
        self.peaks = as_type(peaks, torch.bfloat16).view(streams // 2, blocks)

    def planes_bytes(self, want: Tensor) -> int:
        """Of the answer that brings the tokens to these levels."""
        if not len(self.blocks):
            return 0
        have, held = (bitplanes.planes(self.boxes, level) for level in (self.level, want))
        return bitplanes.packed_bytes(have, held) + self._norm_bytes

    def read_planes(self, data: Tensor, want: Tensor) -> None:
        streams, blocks = self.shape[:2]
        if not blocks:
            return
        packed, norms, span = data.split([len(data) - self._norm_bytes, 4 * streams * blocks, 2 * streams])
        have, held = (bitplanes.planes(self.boxes, level) for level in (self.level, want))
        self.codes = bitplanes.unpack(packed, self.codes, have, held)
        self.level = want
        row, block = as_type(norms, torch.bfloat16).view(2, streams, blocks)
        self.norms = torch.stack([row, block, as_type(span, torch.bfloat16)[:, None].expand(-1, blocks)])

    def tokens(self) -> Tokens:
        """The tokens as they are known."""
        held = bitplanes.planes(self.boxes, self.level)
        x = bitplanes.decode(self.codes, held, self.boxes) @ self.basis.rows[:, None]
        heads = len(x) // 2
        unit = torch.exp2(-self.level.to(self.dtype)).where(self.valid, 0)
        radii = torch.cat([self.norms[:, :heads], self.norms[:, heads:]]).to(self.dtype)[..., None]
        radii = radii * torch.cat(
            [unit[:heads].expand(3, *unit[:heads].shape), unit[heads:].expand(3, *unit[heads:].shape)]
        )
        k, v = x.permute(1, 2, 0, 3).flatten(0, 1).split(heads, 1)
        k, v = self.turn.to(k, self.positions.flatten()).to(self.dtype), v.to(self.dtype)
        least = (v.norm(dim=-1) * (1 - 1e-5) - _flat(radii[3])).clamp(min=0)
        last = self.positions == self.positions.masked_fill(~self.valid, -1).amax(-1, keepdim=True)
        peak = torch.where(last[None] & self.valid, self.peaks.to(self.dtype)[..., None], 0)
        return Tokens(k, v, torch.stack([_flat(r) for r in radii]), least, _flat(peak), self.positions.flatten())

    def room(self) -> Int32[Tensor, "c k m"]:
        """By how many levels each token may rise; beyond, its residual would no longer shrink as levels say."""
        return (bitplanes.finest(self.boxes)[..., None] - self.level).clamp(min=0).where(self.valid, 0)

    def costs(self) -> Tensor:
        """Bits of one more level of each token, about."""
        more = bitplanes.planes(self.boxes, self.level + 3) - bitplanes.planes(self.boxes, self.level + 2)
        return more.sum(-1).clamp(min=1)


class Given(NamedTuple):
    """A source of which everything is known."""

    request: Int64[Tensor, " b"]
    known: Tokens

    def tokens(self) -> Tokens:
        return self.known


class Tokens(NamedTuple):
    """Keys and values as a receiver has them; radii and norms are zero where no token is.

    Attributes:
        radii: of the key, alone, in its block, in its span, then of the value: see `kernels.certificate`.
        least: the value is no shorter.
        peak: neither is some value of the block whose last token this is.
    """

    k: Float[Tensor, "n g d"]
    v: Float[Tensor, "n g d"]
    radii: Float[Tensor, "6 n g"]
    least: Float[Tensor, "n g"]
    peak: Float[Tensor, "n g"]
    positions: Int64[Tensor, " n"]

    def take(self, blocks: Int64[Tensor, " b"]) -> Tokens:
        """Those of some blocks."""
        index = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten()
        return Tokens(self.k[index], self.v[index], self.radii[:, index], *(x[index] for x in self[3:]))


def own_tokens(k: Tensor, v: Tensor, layout: Layout) -> Tokens:
    """Tokens of which everything is known."""
    rows, valid = layout.rows.flatten(), layout.valid.flatten()
    keys, values = (x[rows].to(wide(x.dtype)) for x in (k, v))
    least = (values.norm(dim=-1) * (1 - 1e-5)).where(valid[:, None], 0)
    return Tokens(keys, values, keys.new_zeros(6, *keys.shape[:2]), least, least, layout.positions.flatten())


def first_levels(valid: Bool[Tensor, "k m"], streams: int, first: tuple[int, int]) -> Int32[Tensor, "c k m"]:
    """Those of the first bits: of keys, of values, of places where no token is."""
    level = torch.tensor(first, dtype=torch.int32, device=valid.device).repeat_interleave(streams // 2)
    return torch.where(valid, level[:, None, None], NOTHING)


def write_raises(gain: Int32[Tensor, "c n"]) -> UInt8[Tensor, " bytes"]:
    """How many bits each token of each stream is to gain: by rank among the frequent gains, in unary."""
    parts = []
    for stream in gain:
        values, counts = stream.unique(return_counts=True)
        table = values[counts.argsort(descending=True, stable=True)]
        rank = (stream[:, None] == table).int().argmax(-1)
        ends = (rank + 1).cumsum(0) - 1
        bits = torch.ones(int(ends[-1]) + 1, dtype=torch.uint8, device=gain.device)
        bits[ends] = 0
        parts += [table.new_tensor([len(table)]).to(torch.uint8), table.to(torch.uint8), bitplanes.pack_bits(bits)]
    return torch.cat(parts)


def read_raises(data: UInt8[Tensor, " bytes"], streams: int, tokens: int) -> Int32[Tensor, "c n"]:
    """What `write_raises` wrote."""
    found = []
    for _ in range(streams):
        size = int(data[0])
        table, data = data[1 : 1 + size], data[1 + size :]
        ends = (bitplanes.unpack_bits(data) == 0).nonzero()[:tokens, 0]
        rank = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1
        found.append(table[rank].int())
        data = data[int(ends[-1]) // 8 + 1 :]
    return torch.stack(found)


def as_bytes(x: Tensor) -> UInt8[Tensor, " bytes"]:
    return x.contiguous().view(-1).view(torch.uint8)


def as_type(data: UInt8[Tensor, " bytes"], dtype: torch.dtype) -> Tensor:
    return data.clone().view(dtype)


def _some(boxes: bitplanes.Boxes, blocks: Tensor) -> bitplanes.Boxes:
    return bitplanes.Boxes(boxes.unit, boxes.low[:, blocks], boxes.width[:, blocks])


def _flat(x: Tensor) -> Tensor:
    """[g, b, m] as [b * m, g]."""
    return x.flatten(1).T


def _round_down(x: Float64[Tensor, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    bits = (x * (1 - 1e-6)).float().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What attention of that dtype is computed in."""
    return torch.promote_types(dtype, torch.float32)
