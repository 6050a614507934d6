"""The bundled model read by ranks that hold a slice of the tokens each, with the attention of any core.

Everything in a Llama but attention is of each token by itself, so an ordinary Transformers model runs on a rank's own
tokens and positions; the function that it calls for attention is the core's. Weights and activations are float32; q, k
and v are rounded to bfloat16, as they would lie in a cache and travel.

The texts are held-out source with retrieval lines, as `examples/train_tiny.py` draws them; some names are set and never
asked for, and are left to be asked for by decode.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "tiny-llama"
OPEN = 16  # names of a text that are left to be asked for
CHUNK = 256  # queries whose scores are held at once, in float64


class Text(NamedTuple):
    """Tokens, at each the distance of the value that it repeats (0: none), and which are source.

    `distances` are all that may occur; `asks` are lines `#get name` that could follow, with their `answers`.
    """

    ids: Tensor
    distance: Tensor
    distances: tuple[int, ...]
    source: Tensor
    asks: Tensor
    answers: Tensor


class Heads(NamedTuple):
    """What a layer attends with: this rank's tokens, rotated, bfloat16."""

    q: Tensor
    k: Tensor
    v: Tensor


class Read(NamedTuple):
    """A text read: this rank's tokens, what the model says after each, and every layer's heads."""

    rows: Tensor
    logits: Tensor
    heads: list[Heads]


class Truth(NamedTuple):
    """Attention of this rank's queries in float64, [t, H, D]; e to the entropy, and the mass on other ranks' keys."""

    out: Tensor
    effective: Tensor
    remote: Tensor


def draw(length: int, count: int, *, seed: int = 1) -> list[Text]:
    """That many texts, each with an equal number of pairs at every distance that fits."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "examples"))
    from train_tiny import DISTANCES, SHARE, Corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    corpus, rng = Corpus(tokenizer, held_out=True), np.random.default_rng(seed)
    markers = tokenizer.convert_tokens_to_ids(["#set", "#get"])
    distances = [d for d in DISTANCES if d < 0.97 * length]
    each = max(1, int(SHARE * length / 8) // len(distances))
    texts = []
    for _ in range(count):
        pairs = corpus.draw_pairs(rng, [*distances * each, *[8] * OPEN], length - 16)
        asked, left = pairs[:-OPEN], [replace(pair, distance=2 * length) for pair in pairs[-OPEN:]]
        sample = corpus.plant(int(rng.integers(len(corpus.ids) - length)), length, [*asked, *left])
        ids = torch.from_numpy(sample.ids)
        present = set(zip(ids.tolist(), ids[1:].tolist(), ids[2:].tolist(), strict=False))
        left = [pair for pair in left if (markers[0], pair.name, pair.value) in present]
        texts.append(
            Text(
                ids,
                torch.from_numpy(sample.planted),
                tuple(distances),
                ~lines_from(ids, markers),
                torch.tensor([[markers[1], pair.name] for pair in left]),
                torch.tensor([pair.value for pair in left]),
            )
        )
    return texts


def lines_from(ids: Tensor, markers: Sequence[int]) -> Tensor:
    """Which tokens are part of a line that a marker begins: four each."""
    begins = torch.isin(ids, torch.tensor(markers))
    found = begins.clone()
    for later in range(1, 4):
        found[later:] |= begins[:-later]
    return found


class Reader:
    """One rank's model."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        AttentionInterface.register("seqpar.core", _attend)
        load = LlamaForCausalLM.from_pretrained
        self.model = load(CHECKPOINT, dtype=torch.float32, attn_implementation="seqpar.core").eval()
        self.whole = load(CHECKPOINT, dtype=torch.float32, attn_implementation="sdpa").eval()

    def read(self, ids: Tensor, core: Any) -> Read:
        """Read `ids[T]`, the same on every rank, with one core for all layers."""
        from seqpar.ragged import RaggedBatch

        batch, seen = RaggedBatch.prefill((len(ids),)), []
        for layer in self.model.model.layers:
            layer.self_attn.reading = core, batch, seen
        rows = core.rows(batch)
        logits = self.model(input_ids=ids[rows][None], position_ids=rows[None], use_cache=False).logits[0]
        return Read(rows, logits, seen)

    def answers(self, heads: Sequence[Heads], asks: Tensor) -> Tensor:
        """The likeliest token after each of `asks[n, 2]`, decoded over the keys and values that a reading left.

        Attention of these steps is exact, over the gathered cache: ranks that ship queries compute the same. On rank 0;
        nothing elsewhere.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, layer in enumerate(heads):
            whole = [gather(x).transpose(0, 1).float() for x in (layer.k, layer.v)]
            cache.update(*(x[None].expand(len(asks), -1, -1, -1) for x in whole), index)
        if dist.get_rank():
            return asks[:0, 0]
        logits: Tensor = self.whole(input_ids=asks, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """What Transformers calls in every layer, [1, H, T/p, D]."""
    from seqpar import comm

    core, batch, seen = module.reading
    heads = Heads(*(x[0].transpose(0, 1).bfloat16().contiguous() for x in (query, key, value)))
    seen.append(heads)
    out: Tensor = comm.run(core.steps(*heads, batch))
    return out.to(query.dtype)[None], None


def gather(x: Tensor) -> Tensor:
    """All ranks' tokens of x, which are as many on each, in rank order: not counted, since no method sends them."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def truth(heads: Heads, rows: Tensor) -> Truth:
    """Exact attention of consecutive `rows` in float64, by its definition, and how sharp it is."""
    k, v = (gather(x).double().repeat_interleave(heads.q.shape[1] // x.shape[1], 1) for x in heads[1:])
    q, first = heads.q.double() * heads.q.shape[-1] ** -0.5, int(rows[0])
    out = torch.empty_like(q)
    effective, remote = torch.empty_like(q[..., 0]), torch.empty_like(q[..., 0])
    for start in range(0, len(rows), CHUNK):
        these = slice(start, start + CHUNK)
        keys = slice(0, int(rows[these][-1]) + 1)
        scores = torch.einsum("thd,shd->hts", q[these], k[keys])
        hidden = torch.arange(keys.stop) > rows[these, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[these] = torch.einsum("hts,shd->thd", weights, v[keys])
        logs = weights.log().clamp_min_(torch.finfo(weights.dtype).min)
        effective[these] = (weights * logs).sum(-1).neg_().exp_().T
        remote[these] = weights[..., :first].sum(-1).T
    return Truth(out, effective, remote)
