"""Text from a checkpoint over several ranks, by Hugging Face's own `generate`.

    torchrun --nproc-per-node 2 examples/generate.py "def read_config(path):" --sp 2
    torchrun --nproc-per-node 4 examples/generate.py "def read_config(path):" --tp 2 --sp 2 --shift 64 --overlap auto
    python examples/generate.py "def read_config(path):" --model path/to/qwen3 --dtype bfloat16

Every rank reads its slices of the checkpoint, makes the same calls, and gets the same tokens. Rank 0 prints them as
they come, and at the end what was read, what is stored, and what was sent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer

import seqpar
from seqpar import comm

CHECKPOINT = Path(__file__).parent / "tiny-llama"


def main(arguments: list[str] | None = None) -> str:
    options = parse(arguments)
    mesh = seqpar.init_mesh(options.tp, options.sp)
    is_first = comm.groups(mesh).flat.rank() == 0
    model = seqpar.hf.load(
        options.model,
        mesh,
        dtype=getattr(torch, options.dtype),
        shift=options.shift,
        overlap=options.overlap,
        wire=options.wire,
        progress=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    torch.manual_seed(options.seed)
    with comm.record() as sent:
        out = model.generate(
            **tokenizer(options.prompt, return_tensors="pt").to(model.device),
            max_new_tokens=options.new_tokens,
            do_sample=options.temperature > 0,
            **({"temperature": options.temperature} if options.temperature > 0 else {}),
            streamer=TextStreamer(tokenizer) if is_first else None,
        )
    if is_first:
        print(model.seqpar.report)
        print(f"{sent.total.num_bytes:,} bytes sent in {sent.total.calls:,} collectives")
    return tokenizer.decode(out[0])


def shift(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", default="class Stack:\n    def __init__(self):\n")
    add("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--tp", type=int, default=1, help="tensor-parallel ranks")
    add("--sp", type=int, default=1, help="sequence-parallel ranks")
    add("--shift", type=shift, default="off", help='up to so many tokens a step is tensor-parallel, or "auto"')
    add("--overlap", choices=("off", "auto"), default="off", help="hide sums of one part of a prompt under another")
    add("--wire", choices=("int8", "fp8"), help="8 bits a number on the link")
    add("--new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
