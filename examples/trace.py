"""Two chunks of a prompt through a small Llama on two ranks, over a simulated link: the report, the check, the picture.

torchrun --nproc-per-node=2 examples/trace.py trace.png
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import seqpar
from seqpar import comm
from seqpar.hf import parallelize
from seqpar.partition import Interleave


def main(path: str, tokens: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = seqpar.init_mesh(tp=2, device="cpu")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(512, (1, tokens))
    link = comm.SimulatedLink(alpha_s=2e-4, bytes_per_s=1e8)
    with parallelize(model, mesh, overlap=Interleave(2, min_tokens=2)), torch.no_grad(), link.on(comm.groups(mesh).tp):
        for _ in range(3):  # the last one is shown
            with comm.trace() as t:
                model(ids, logits_to_keep=1)
    whole = t.gather(group=comm.groups(mesh).flat)
    comm.check_schedule(whole)
    if comm.groups(mesh).flat.rank() == 0:
        print(whole.report())
        whole.plot(path, title=f"{tokens} tokens in two chunks through three layers, tp=2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the picture")
    parser.add_argument("--tokens", type=int, default=1024, help="in the prompt")
    main(**vars(parser.parse_args()))
