"""A model of your own from the parts: on any tp x sp, served by the loop over requests, equal to one process.

    torchrun --nproc-per-node 2 examples/custom_model.py --sp 2
    torchrun --nproc-per-node 4 examples/custom_model.py --tp 2 --sp 2

Its layers are those of Qwen3, with heads that together are wider than the model. Tensors are called as they are in one
process, so `load_state_dict` takes those of the whole model, of which it keeps this rank's slices.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import seqpar
from seqpar import comm, layers
from seqpar.batching import Budget, Request, StallFree, TemporalFusion
from seqpar.kernels import RopeConfig, rope_table
from seqpar.kv import PagedKV
from seqpar.partition import HeadMap, even_ranges
from seqpar.ragged import RaggedBatch


@dataclass(frozen=True)
class Config:
    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 150
    num_layers: int = 2
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16


class Model(nn.Module):
    """Embedding, decoder layers, norm and head. Nothing here asks how many ranks there are."""

    def __init__(self, config: Config, groups: comm.Groups) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        self.heads = HeadMap(config.num_heads, config.num_kv_heads, *groups.layout)
        self.rope = RopeConfig(config.head_dim)
        vocab, size, sp = config.vocab_size, config.hidden_size, groups.layout.sp
        self.embed_tokens = layers.VocabParallelEmbedding(vocab, size, group=groups.tp, sp=sp)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.num_layers))
        self.norm = layers.RMSNorm(size)
        self.lm_head = layers.ParallelLMHead(size, vocab, group=groups.flat, seq_group=groups.sp)
        layers.name_modules(self)  # what comm.record() and comm.trace() call them

    def _layer(self, index: int) -> layers.ParallelDecoderLayer:
        config, heads, groups = self.config, self.heads, self.groups
        size, dim, sp, tp = config.hidden_size, config.head_dim, groups.layout.sp, groups.tp
        norms = {name: layers.RMSNorm(dim, over_tp=True) for name in ("q_norm", "k_norm")}
        qkv = layers.QKVParallelLinear(size, heads, dim, group=tp)
        core = layers.UlyssesAttention(heads, dim, group=groups.sp, tp_rank=tp.rank(), layer_index=index, **norms)
        out = layers.RowParallelLinear(config.num_heads * dim, size, group=tp, sp=sp, bias=False, unit=dim)
        mlp = layers.ParallelMLP(size, config.intermediate_size, group=tp, sp=sp)
        before, after = layers.RMSNorm(size), layers.RMSNorm(size)
        return layers.ParallelDecoderLayer(layers.ParallelAttention(qkv, core, out), mlp, before, after, groups=groups)

    def steps(self, ids: Tensor, batch: RaggedBatch, kv: PagedKV | None, rows: Sequence[int]) -> comm.Steps[Tensor]:
        """Logits of some rows. Every rank has all ids and computes its share of them; yields at each collective."""
        mine = even_ranges(batch.num_tokens, self.groups.layout.sp)[self.groups.sp.rank()]
        x = yield from comm.call(self.embed_tokens, ids[slice(*mine)])
        cos, sin = rope_table(self.rope, batch.positions, dtype=x.dtype)
        for layer in self.layers:
            x = yield from comm.call(layer, x, batch, cos, sin, kv)
        return (yield from comm.call(self.lm_head, self.norm(x), rows=rows, num_tokens=batch.num_tokens))

    def forward(self, ids: Tensor, batch: RaggedBatch, kv: PagedKV | None, rows: Sequence[int]) -> Tensor:
        return comm.run(self.steps(ids, batch, kv, rows))


@torch.no_grad()
def generate(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of several prompts, all in one loop over one paged cache."""
    config, own_heads = model.config, model.heads.kv_ranges[model.groups.flat.rank()].size
    kv = PagedKV(config.num_layers, 64, 16, num_kv_heads=own_heads, head_dim=config.head_dim)
    loop = TemporalFusion(
        lambda batch, ids, rows: model(ids, batch, kv, rows),
        kv,
        vocab_size=config.vocab_size,
        policy=StallFree(tau=32),
        budget=Budget(max_tokens=64, max_requests=8),
    )
    asked = [loop.add(Request(number, list(prompt), new_tokens)) for number, prompt in enumerate(prompts)]
    return [list(each) for each in asked]


def main(tp: int, sp: int) -> None:
    torch.set_num_threads(1)
    prompts = [range(n, 3 * n) for n in (5, 20, 33)]
    results = []
    for mesh in (seqpar.init_mesh(tp, sp), seqpar.init_mesh()):  # all ranks together, and each alone
        torch.manual_seed(0)  # the same weights, however they are cut
        results.append(generate(Model(Config(), comm.groups(mesh)), prompts, new_tokens=12))
    assert results[0] == results[1], "several ranks must generate what one does"
    if torch.distributed.get_rank() == 0:
        print(f"tp={tp} sp={sp}: {sum(map(len, results[0]))} tokens, all equal to those of one process")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--sp", type=int, default=1, help="sequence-parallel ranks")
    main(**vars(parser.parse_args()))
