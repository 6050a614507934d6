"""The main job: one Llama checkpoint under every layout that the ranks allow, token for token.

    torchrun --nproc-per-node 2 examples/demo.py          # or: make demo, RANKS=4 make demo

For every factorisation tp x sp of the ranks, once for prefills under Ulysses and decodes under tensor parallelism
(Shift), and once for prefills by ring attention and decodes that ship queries, it loads the checkpoint by slices, runs
Hugging Face's own `generate`, streams the text, and compares every token with the unswapped Transformers model in the
same process. It ends with a table of speed, traffic and memory per layout, and with exit code 1 if any token differs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

import seqpar
from seqpar import comm
from seqpar.partition import Layout

CHECKPOINT = Path(__file__).parent / "tiny-llama"
SHIFT = 32  # up to so many tokens a step is tensor-parallel over all ranks
PROMPTS = (
    'def read_config(path, encoding=\'utf-8\'):\n    """Read a configuration file and return',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n",
)


@dataclass
class Row:
    """What one layout did; rates per second, bytes on this rank."""

    name: str
    prefill: float
    decode: float
    prefill_bytes: float
    decode_bytes: float
    read: int
    weights: int
    kv: int
    correct: bool


def main() -> int:
    options = parse()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    long_prompt = context(tokenizer, options.prompt_tokens)
    if rank == 0:
        print(
            f"seqpar {seqpar.__version__} on {world} rank(s), {torch.get_num_threads()} thread(s) each: {options.model}"
        )
        print("reference: the unswapped Transformers model ...", flush=True)
    expected = reference(options, tokenizer, prompts, long_prompt)
    cases: list[tuple[Layout, str, dict[str, Any]]] = [(layout, "", {}) for layout in layouts(world)]
    if world > 1:
        cases.append((Layout(1, world), "shift", {"shift": SHIFT}))
        cases.append((Layout(1, world), "ring", {"prefill": "ring", "decode": "qship"}))
    rows = [run(options, *case, tokenizer, prompts, long_prompt, expected) for case in cases]
    if rank == 0:
        show(rows)
    return 0 if all(row.correct for row in rows) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled one)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="length of the timed prompt (default: 1024)")
    parser.add_argument("--sequence-sharded", action="store_true", help="split activations between linears over tp too")
    return parser.parse_args()


def layouts(world: int) -> list[Layout]:
    """Every factorisation of the ranks, from all tensor to all sequence parallelism."""
    return [Layout(world // sp, sp) for sp in range(1, world + 1) if world % sp == 0]


def context(tokenizer, length: int) -> torch.Tensor:
    """A long prompt of real text: this file, repeated."""
    ids = tokenizer(Path(__file__).read_text(), return_tensors="pt").input_ids
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]


def generation(options: argparse.Namespace) -> dict:
    return {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}


def reference(options, tokenizer, prompts, long_prompt) -> tuple[torch.Tensor, ...]:
    """What the unswapped model says, in this process."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    return (
        model.generate(**tokenizer([PROMPTS[0]], return_tensors="pt"), **generation(options)),
        model.generate(**prompts, **generation(options)),
        model.generate(long_prompt, attention_mask=torch.ones_like(long_prompt), **generation(options)),
    )


def run(options, layout, technique, how, tokenizer, prompts, long_prompt, expected) -> Row:
    """Load under one layout, check every token, measure."""
    name = f"{layout.tp} x {layout.sp} {technique}".rstrip()
    mesh = seqpar.init_mesh(tp=layout.tp, sp=layout.sp)
    first = comm.groups(mesh).flat.rank() == 0
    if first:
        print(f"\n=== tp x sp = {name} " + "=" * 60, flush=True)
    model = seqpar.hf.load(
        options.model,
        mesh,
        dtype=torch.float32,
        progress=first,
        sequence_sharded=options.sequence_sharded,
        **how,
    )
    one = tokenizer([PROMPTS[0]], return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if first else None
    streamed = model.generate(**one, **generation(options), streamer=streamer)
    out = model.generate(**prompts, **generation(options))
    row, out_long = measure(options, name, model, long_prompt)
    checks = (
        ("streamed text", streamed, expected[0]),
        ("left-padded batch", out, expected[1]),
        (f"{long_prompt.shape[1]}-token prompt", out_long, expected[2]),
    )
    equal = [report(name, got, want, first) for name, got, want in checks]  # all of them, to say all that is wrong
    row.correct = all(equal)
    return row


def report(name: str, out: torch.Tensor, expected: torch.Tensor, first: bool) -> bool:
    """Compare tokens; say where they part."""
    same = torch.equal(out, expected)
    if first and same:
        print(f"--- {name}: all {out.numel()} tokens equal to Transformers'", flush=True)
    if not same:
        row, column = (out != expected).nonzero()[0].tolist() if out.shape == expected.shape else (0, 0)
        print(f"--- {name}: WRONG TOKEN in row {row} at {column}: {out[row, column]} is not {expected[row, column]}")
    return same


@torch.inference_mode()
def measure(options, name, model, long_prompt) -> tuple[Row, torch.Tensor]:
    """Times and bytes of prefill and decode, through the model's forward, as `generate` calls it."""
    prefill, decode = [], []
    for _ in range(3):
        ids = long_prompt
        with comm.record() as sent_prefill, clock(prefill):
            out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        with comm.record() as sent_decode, clock(decode):
            for _ in range(options.new_tokens - 1):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, token], 1)
    steps = options.new_tokens - 1
    row = Row(
        name,
        prefill=long_prompt.shape[1] / statistics.median(prefill),
        decode=steps / statistics.median(decode),
        prefill_bytes=sent_prefill.total.num_bytes / long_prompt.shape[1],
        decode_bytes=sent_decode.total.num_bytes / steps,
        read=model.seqpar.report.bytes_read,
        weights=model.seqpar.weight_bytes,
        kv=model.seqpar.kv_token_bytes * (ids.shape[1] - 1),
        correct=False,
    )
    return row, ids


@contextmanager
def clock(into: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def show(rows: list[Row]) -> None:
    head = ("layout", "tokens", "prefill", "decode", "sent/token", "sent/token", "read", "weights", "KV used")
    unit = (
        "tp x sp",
        "",
        "tokens/s",
        "tokens/s",
        "prefill, B",
        "decode, B",
        "from disk, B",
        "per rank, B",
        "per rank, B",
    )
    print("\n" + "\n".join("  ".join(f"{cell:>12}" for cell in line) for line in (head, unit)))
    print("  ".join("-" * 12 for _ in head))
    for row in rows:
        cells = (
            row.name,
            "equal" if row.correct else "WRONG",
            f"{row.prefill:,.0f}",
            f"{row.decode:,.1f}",
            f"{row.prefill_bytes:,.0f}",
            f"{row.decode_bytes:,.0f}",
            f"{row.read:,}",
            f"{row.weights:,}",
            f"{row.kv:,}",
        )
        print("  ".join(f"{cell:>12}" for cell in cells))
    print(
        "\nSent bytes are rank 0's, by the collective's own volume; times are medians of 3, ranks share this machine."
    )


if __name__ == "__main__":
    sys.exit(main())
