"""The certificate in float32, rounded up, some queries at a time.

What float32 may do to it is added as if it had been done by somebody who means harm (u = 2**-24):

* a logit is off by (d + 16) u |q| |k| and what the subtraction of the largest loses: both are added to delta, for every
  key, exact ones too;
* weights are off by a factor 1 +- g, as are sums of up to `block` terms, then of as many as there are blocks;
  g = 4 u (block + blocks + 2 d + 40), the bound is multiplied by 1 + g, and g times the largest value added;
* a distance |v - O| by the expansion of its square: 4 u (d + 8) (|v|**2 + |O|**2) is added under the root;
* a weight that underflows was below e**-87 of the largest, and times e**40 still below 1e-20: a query whose delta can
  pass 40 gets no better bound than the diameter, all others 1e-9 of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["ROUNDOFF", "Terms", "chunks"]

ROUNDOFF = 2.0**-24
WORST = 40.0
"""Error of a logit beyond which nothing is said."""
CHUNK = 1 << 22
"""Weights that are held at a time."""


class Terms:
    """What the certificate of some queries is made of.

    In:    q[R, D]; k, v[N, D], of which the first `own` blocks are exact; radii[6, N], see `reference`; reach[R];
           seen[R, N]; `spans` are numbers of blocks, those of one source after those of another, after the own ones.
    """

    def __init__(
        self,
        q: Float[Tensor, "r d"],
        k: Float[Tensor, "n d"],
        v: Float[Tensor, "n d"],
        radii: Float[Tensor, "6 n"],
        reach: Float[Tensor, " r"],
        seen: Bool[Tensor, "r n"],
        *,
        softmax_scale: float,
        block: int,
        own: int,
        spans: Sequence[int],
    ) -> None:
        self.block, self.own, self.spans = block, own, spans
        self.key, self.value = radii[:3], radii[3:]
        self.reach = reach
        self.guard = 4 * ROUNDOFF * (block + len(k) // block + 2 * q.shape[1] + 40)
        self.plain = 2 * ROUNDOFF * (len(k) + 40)
        v_squares = v.square().sum(-1)
        nothing = k.new_zeros(())
        self.key_norms = k.square().sum(-1).sqrt()
        self.most = (v_squares.sqrt() + self.value[0]).amax() if len(v) else nothing
        self.slip = 1.05 * ROUNDOFF * (q.shape[1] + 16) * softmax_scale * q.norm(dim=-1)
        scores = (q @ k.T).mul_(softmax_scale).masked_fill_(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True) if len(k) else scores.new_full((len(q), 1), -torch.inf)
        self.shift_error = (2 * ROUNDOFF * top[:, 0].abs()).where(top[:, 0] > -torch.inf, 0) + 1e-30
        self.p = scores.sub_(top.where(top > -torch.inf, 0)).exp_()
        total = self._sums(self.p, torch.ones_like(k[:, 0])).sum(-1)
        self.p /= total.where(total > 0, 1)[:, None]
        self.lse = (top[:, 0] + total.log()).where(total > 0, -torch.inf)
        self.out = (self._blocks(self.p) @ v.unflatten(0, (len(v) // block, block))).sum(0)
        squares = v_squares + self.out.square().sum(-1, keepdim=True)
        close = torch.addmm(squares, self.out, v.T, alpha=-2)
        self.apart = close.clamp_(min=0).add_(squares, alpha=4 * ROUNDOFF * (q.shape[1] + 8)).sqrt_()
        self.moved = self._spread(self.p, self.value)

    def bound(self) -> Float[Tensor, " r"]:
        """The certificate of every query."""
        delta = torch.outer(self.reach, self.key[0]).addr_(self.slip, self.key_norms).add_(self.shift_error[:, None])
        grown = delta.clamp(max=WORST).expm1_()
        kept = (self.p / (1 + grown)).sum(-1) * (1 - self.plain)
        steep = self.p * grown.div_(delta)
        least = torch.maximum(1 - self._turned(steep) * (1 + self.guard), kept)
        far = self.apart + (self.value[0] + (self.moved + self.guard * self.most)[:, None])
        turned = self._turned(steep.mul_(far))
        bound = (turned / least.where(least > 0, 1) + self.moved) * (1 + self.guard)
        bound = bound + (self.guard + 1e-9) * self.most
        largest = self.key[0].amax() if len(self.key[0]) else self.most
        tame = self.reach * largest + self._logit_error() < WORST
        widest = (self.out.norm(dim=-1) + self.most) * (1 + self.guard)
        certain = tame & (least > 0) & (bound < widest)
        return bound.where(certain, widest).where(self.lse > -torch.inf, 0)

    def sharpened(self, gain: Float[Tensor, "two m"]) -> Terms:
        """What they would be if the spans' keys and values had that many more bits, and nothing else changed."""
        then = copy(self)
        factor = torch.ones(2, self.p.shape[1], dtype=self.p.dtype, device=self.p.device)
        factor[:, self.own * self.block :] = torch.exp2(-gain)
        then.key, then.value = self.key * factor[0], self.value * factor[1]
        then.moved = then._spread(then.p, then.value)
        return then

    def doubt(self) -> Float[Tensor, " r"]:
        """How far the log-sum-exp of exact keys is off."""
        found: Tensor = (self._logit_error() + self.guard + 4 * ROUNDOFF * self.lse.abs()).where(
            self.lse > -torch.inf, 0
        )
        return found

    def pressures(self) -> tuple[Float[Tensor, "r m"], Float[Tensor, "r m"]]:
        """What a unit of each key's and value's own radius adds to each query's bound, about; only of spans."""
        remote = self.own * self.block
        k, v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self._spread(self.p * (self.apart + self.value[0] / 2), self.key, k)
        self._spread(self.p, self.value, v)
        return k[:, remote:] * self.reach[:, None], v[:, remote:]

    def _logit_error(self) -> Tensor:
        """What rounding does to the logits of a query at most."""
        longest = self.key_norms.amax() if len(self.key_norms) else self.most
        found: Tensor = self.slip * longest + self.shift_error
        return found

    def _turned(self, weight: Tensor) -> Tensor:
        """How far the errors of the logits turn a sum with these weights."""
        rounded = self._sums(weight, self.key_norms).sum(-1) * self.slip
        rounded = rounded + self._sums(weight, torch.ones_like(weight[0])).sum(-1) * self.shift_error
        found: Tensor = self._spread(weight, self.key) * self.reach + rounded
        return found

    def _spread(self, weight: Tensor, radii: Tensor, slopes: Tensor | None = None) -> Tensor:
        """See `reference.spread`; any choice of heavy rows is right: theirs is by the gain of one token, roughly.

        `slopes` is filled with what a unit of each token's own radius adds, if all of a block or a span shrink alike:
        in the direction of the optimum, where each weight times its radius is the same.
        """
        row, whole, span = radii
        rows, blocks = self._sums(weight, row), self._sums(weight.square(), whole.square()).sqrt_()
        by_block, total, at = torch.minimum(rows, blocks), torch.zeros_like(rows[:, :0].sum(-1)), self.own
        per_row = row.where(row > 0, torch.inf).reciprocal()
        for size in self.spans:
            some, tokens = slice(at, at + size), slice(at * self.block, (at + size) * self.block)
            w, squares, square = weight[:, tokens], weight[:, tokens].square(), span[tokens].square()
            light = w * (square * per_row[tokens]) <= 2 * (squares @ square).sqrt_()[:, None]
            rest = (squares.masked_fill(~light, 0) @ square).sqrt_()
            joint = (w.masked_fill(light, 0) @ row[tokens] + rest) * (1 + self.plain)
            near = by_block[:, some].sum(-1)
            total = total + torch.minimum(joint, near)
            if slopes is not None:
                share = rest / (w.masked_fill(~light, 0) @ row[tokens]).clamp(min=1e-30)
                over = torch.where(light, w * share.clamp(max=1)[:, None], w)
                inside = by_block[:, some] / rows[:, some].clamp(min=1e-30)
                within = w * inside.repeat_interleave(self.block, 1)
                slopes[:, tokens] = torch.where((joint < near)[:, None], over, within)
            at += size
        return total

    def _sums(self, x: Tensor, weights: Tensor) -> Tensor:
        """Over every block, of x times the tokens' weights: a small matrix product."""
        return (self._blocks(x) @ weights.view(len(weights) // self.block, self.block, 1))[..., 0].T

    def _blocks(self, x: Tensor) -> Tensor:
        found: Tensor = x.unflatten(-1, (x.shape[-1] // self.block, self.block)).transpose(0, 1)
        return found


def chunks(rows: int, keys: int) -> Iterator[slice]:
    """A few queries at a time."""
    step = max(1, CHUNK // max(keys, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
