"""Train the bundled checkpoint `examples/tiny-llama/`: a small Llama that reads code and remembers.

Parallel attention can only be judged on attention that has something to find. This script trains a model small enough
to live in the repository and real enough to measure on: its text looks like Python, and its heads fetch single tokens
from thousands of tokens back.

Data.  CPython's standard library, from the machine it runs on (`sysconfig`), without tests, tables and site-packages.
    One file in twenty, chosen by a hash of its path, is held out. Between the lines of source stand retrieval lines::

        #set colour thread
        ...                     # 8 to 8000 tokens of source, with other pairs in between
        #get colour thread

    A name is set once and asked for once in a sequence; names and values are drawn anew for every sequence from the
    words that are one token, and distances are uniform in the logarithm. Nothing but the `#set` line predicts the
    value, so its loss is low only if attention finds it.

Model.  `LlamaForCausalLM`: 4 layers of width 256, 8 query and 2 KV heads, context 8192, a byte-level BPE of 1537 tokens
    (lossless; 1537 divides by none of 2, 3, 4, so that vocabulary shards are uneven). Weights are stored in bfloat16.

Curriculum.  Attention that copies is discovered in sequences of 128 tokens, half of them retrieval lines and half
    "echoes" (a stretch of source said again and again). At 512 tokens positions then jump once in a sequence, so that
    distances up to 8192 are met without their cost; the last steps are true sequences of 8192. Muon trains the
    matrices inside the layers, AdamW the rest; the learning rate is constant and then falls linearly.

    python examples/train_tiny.py                                  # train; --resume goes on from the last save
    python examples/train_tiny.py --evaluate                       # held-out loss, retrieval by distance, a sample
    python examples/train_tiny.py --workers 1 --batch-scale 8 --steps-scale 2      # more of everything, for a GPU

Needs `pip install seqpar[hf]`; with `seqpar[plot]` training also draws `training.png`. The numbers that this run gave
are in `examples/tiny-llama/README.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sysconfig
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

CONTEXT = 8192
VOCAB_SIZE = 1537
SHARE = 0.15  # of the tokens of a sequence that are retrieval lines, at the end of training and in evaluation
DISTANCES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 7936)
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}

# A piece never continues past a newline, so lines tokenize alike alone and in context (a blank line joins its
# predecessor): retrieval lines can be planted between tokens, and the result is what the tokenizer itself would say.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# ---- data


def library_files() -> dict[str, str]:
    """The standard library's modules by relative path, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (p for p in sorted(root.rglob("*.py")) if not EXCLUDED & set(p.relative_to(root).parts))
    return {p.relative_to(root).as_posix(): p.read_text("utf-8", errors="replace") for p in paths}


def is_held_out(name: str) -> bool:
    """Whether a module is kept from training: one in twenty, by the hash of its path."""
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE over `texts`, with `<s>`, `</s>`, `<pad>`, and `#set`, `#get` as single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    markers = ["#set\n#get\n"] * 20_000  # frequent enough that both become one token
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *markers], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class Pair:
    """One retrieval: `#set name value` at token `set_at`, `#get name value` about `distance` tokens later."""

    name: int
    value: int
    set_at: int
    distance: int


@dataclass(frozen=True)
class Sample:
    """A sequence of tokens, at each the distance of the value that it repeats (0: ordinary token), and positions."""

    ids: np.ndarray
    planted: np.ndarray
    positions: np.ndarray

    def stretched(self, rng: np.random.Generator, reach: int) -> Sample:
        """The sample with one jump in its positions, which then reach up to at most `reach`."""
        length = len(self.ids)
        if reach <= length:
            return self
        cut, gap = int(rng.integers(1, length)), int(rng.integers(reach - length + 1))
        return replace(self, positions=self.positions + gap * (self.positions >= cut))


class Corpus:
    """Tokens of the library, and sequences cut from them with retrieval lines planted between their lines."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, held_out: bool) -> None:
        texts = [text for name, text in library_files().items() if is_held_out(name) is held_out]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        ends_line = np.array([token.endswith("Ċ") for token in tokens])  # Ċ is the byte-level spelling of a newline

        self.num_bytes = sum(len(text.encode()) for text in texts)
        self.ids = np.concatenate([np.array([bos, *ids, eos], dtype=np.int64) for ids in encoded])
        self.line_start = np.zeros(len(self.ids), dtype=bool)
        self.line_start[1:] = ends_line[self.ids[:-1]] & ~ends_line[self.ids[1:]]
        self.words = np.array([i for i, token in enumerate(tokens) if re.fullmatch(r"Ġ[a-z]{3,}", token)])
        special = set(tokenizer.all_special_ids)
        self.token_bytes = np.array([0 if i in special else len(token) for i, token in enumerate(tokens)])
        self._bos = bos
        self._set, self._get = tokenizer.convert_tokens_to_ids(["#set", "#get"])
        self._newline = tokenizer.convert_tokens_to_ids("Ċ")

    def draw_pairs(self, rng: np.random.Generator, distances: Sequence[int], length: int) -> list[Pair]:
        """One pair for each distance: distinct names, any values, the `#set` wherever the sequence has room."""
        names = rng.permutation(self.words)
        return [
            Pair(int(name), int(rng.choice(self.words)), int(rng.integers(1, max(2, length - distance))), distance)
            for name, distance in zip(names, distances, strict=False)
        ]

    def echo(self, rng: np.random.Generator, length: int) -> Sample:
        """A random stretch of source said again and again, with a random period."""
        start = int(rng.integers(len(self.ids) - length))
        period = int(rng.integers(length // 8, length // 2))
        return Sample(np.resize(self.ids[start : start + period], length), np.zeros(length, int), np.arange(length))

    def training_sample(self, rng: np.random.Generator, length: int, share: float) -> Sample:
        """A random stretch of source in which `share` of the tokens are retrieval lines."""
        count = min(int(share * length / 8), len(self.words))  # a pair is two lines of four tokens
        span = np.log(8), np.log(0.97 * length)
        distances = np.exp(rng.uniform(*span, size=count)).astype(int).tolist()
        start = int(rng.integers(len(self.ids) - length))
        return self.plant(start, length, self.draw_pairs(rng, distances, length))

    def plant(self, start: int, length: int, pairs: Iterable[Pair]) -> Sample:
        """`length` tokens from `start` on, the lines of `pairs` put between theirs at the nearest later line start."""
        lines = [(p.set_at, 0, (self._set, p.name, p.value, self._newline)) for p in pairs]
        lines += [(p.set_at + p.distance, p.distance, (self._get, p.name, p.value, self._newline)) for p in pairs]
        ids, planted = [self._bos], [0]
        source = start
        for at, distance, line in sorted(lines):
            while len(ids) < at or not self.line_start[source]:
                if len(ids) >= length:
                    break
                ids.append(int(self.ids[source]))
                planted.append(0)
                source += 1
            ids.extend(line)
            planted.extend((0, 0, distance, 0))
        tail = max(0, length - len(ids))
        ids.extend(self.ids[source : source + tail].tolist())
        planted.extend([0] * tail)
        return Sample(np.array(ids[:length]), np.array(planted[:length]), np.arange(length))


# ---- training


@dataclass(frozen=True)
class Stage:
    """`steps` steps of `batch` sequences of `length` tokens.

    `share` of the tokens are retrieval lines; `echo` of the sequences are instead a stretch of source said again and
    again. Positions jump ahead once in a sequence, so that they reach up to `reach`.
    """

    steps: int
    length: int
    batch: int
    share: float
    echo: float = 0.0
    reach: int = 0


CURRICULUM = (
    Stage(steps=425, length=128, batch=32, share=0.6, echo=0.5),
    Stage(steps=100, length=512, batch=16, share=0.25, reach=CONTEXT),
    Stage(steps=325, length=512, batch=16, share=SHARE, reach=CONTEXT),
    Stage(steps=24, length=CONTEXT, batch=2, share=SHARE),
    Stage(steps=30, length=2048, batch=4, share=SHARE, reach=CONTEXT),
)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Queries and keys have no biases, so a head can learn "the token before" only from what all embeddings share: give
    # them a share from the start. Blocks that begin as the identity leave the embeddings readable above.
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_(std=0.5).add_(0.5 * torch.randn(embedding.shape[1]))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def new_optimizers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, output and norms."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def draw_batch(corpus: Corpus, stage: Stage, seed: int, step: int) -> list[Sample]:
    """The sequences of one step, a function of `(seed, step)`."""
    rng = np.random.default_rng((seed, step))
    echoes = round(stage.echo * stage.batch)
    samples = [corpus.echo(rng, stage.length) for _ in range(echoes)]
    samples += [corpus.training_sample(rng, stage.length, stage.share) for _ in range(stage.batch - echoes)]
    return [samples[i].stretched(rng, stage.reach) for i in rng.permutation(stage.batch)]


def token_losses(model: LlamaForCausalLM, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Natural-log loss of every token but the first: ids[B, T] -> [B, T-1] float32; bfloat16 inside."""
    mask = torch.ones_like(ids)  # says that a jump in positions does not begin another document
    with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
        logits = model(ids, mask, positions, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def micro_batch(model: LlamaForCausalLM, samples: Sequence[Sample], value_weight: float) -> tuple[Any, ...]:
    """Gradients of the weighted loss of `samples`, and its two parts: ordinary tokens, retrieved values."""
    ids = torch.from_numpy(np.stack([s.ids for s in samples])).to(model.device)
    asked = torch.from_numpy(np.stack([s.planted for s in samples])[:, 1:] > 0).to(model.device)
    positions = torch.from_numpy(np.stack([s.positions for s in samples])).to(model.device)
    losses = token_losses(model, ids, positions)
    weights = 1.0 + (value_weight - 1.0) * asked
    gradients = torch.autograd.grad((losses * weights).sum() / weights.sum(), list(model.parameters()))
    return gradients, losses[~asked].mean().item(), losses[asked].mean().item()


def accumulate_gradients(
    model: LlamaForCausalLM, batches: Sequence[Sequence[Sample]], pool: ThreadPoolExecutor, value_weight: float
) -> tuple[float, float]:
    """Set `.grad` to the mean over micro-batches, each computed by a thread of `pool`; returns the mean losses."""
    parts = list(pool.map(lambda samples: micro_batch(model, samples, value_weight), batches))
    for parameter, *gradients in zip(model.parameters(), *(part[0] for part in parts), strict=True):
        parameter.grad = torch.stack(gradients).mean(0)
    return float(np.nanmean([part[1] for part in parts])), float(np.nanmean([part[2] for part in parts]))


def learning_rate_factor(step: int, total: int, decay: int, warmup: int = 30) -> float:
    """Linear warm-up, constant, linear fall over the last `decay` steps."""
    return min(1.0, (step + 1) / warmup, (total - step) / decay)


def learning_plan(args: argparse.Namespace) -> list[Stage]:
    """The stage of every step."""
    return [
        replace(stage, batch=stage.batch * args.batch_scale)
        for stage in CURRICULUM
        for _ in range(max(1, round(stage.steps * args.steps_scale)))
    ]


def train(args: argparse.Namespace) -> None:
    """Train by `CURRICULUM` into `args.checkpoint`, saving as it goes.

    Step `i` draws its data from `(seed, i)` alone, so an interrupted run goes on exactly where it was.
    """
    torch.manual_seed(args.seed)
    if not args.resume:
        texts = [text for name, text in library_files().items() if not is_held_out(name)]
        train_tokenizer(texts).save_pretrained(args.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    corpus, held_out = Corpus(tokenizer, held_out=False), Corpus(tokenizer, held_out=True)
    model = new_model(tokenizer).to(args.device)
    base_lrs = (args.muon_lr, args.adam_lr)
    optimizers = new_optimizers(model, *base_lrs)
    log: list[dict[str, float]] = []
    if args.resume:
        log = load_state(args.state, model, optimizers)
    print(
        f"{len(corpus.ids):,} training tokens ({corpus.num_bytes / len(corpus.ids):.2f} bytes each), "
        f"{len(corpus.words)} words, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    # Threads that meet once a step lose less on a shared machine than threads that meet in every product.
    threads = max(1, torch.get_num_threads() // args.workers)
    torch.set_num_threads(threads)
    pool = ThreadPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(threads,))
    plan = learning_plan(args)
    bar = tqdm(range(len(log), len(plan)), initial=len(log), total=len(plan), mininterval=5)
    started = time.monotonic() - (log[-1]["seconds"] if log else 0.0)
    for step in bar:
        stage, last = plan[step], step + 1 == len(plan)
        if args.device == "cpu":  # there the fused kernel pays off from some hundred tokens on
            model.set_attn_implementation("eager" if stage.length <= 256 else "sdpa")
        samples = draw_batch(corpus, stage, args.seed, step)
        micro_batches = [samples[i :: args.workers] for i in range(min(args.workers, len(samples)))]
        loss, value_loss = accumulate_gradients(model, micro_batches, pool, args.value_weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = learning_rate_factor(step, len(plan), round(args.decay * args.steps_scale))
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()

        log.append({"loss": loss, "value_loss": value_loss, "seconds": time.monotonic() - started})
        bar.set_postfix(length=stage.length, loss=f"{loss:.3f}", value=f"{value_loss:.3f}", refresh=False)
        if (step + 1) % args.save_every == 0 or last:
            save(model, args.checkpoint)
            save_state(args.state, model, optimizers, log)
            draw_training(log, args.checkpoint / "training.png")
        if (step + 1) % args.check_every == 0 or last:
            found = retrieval(model, held_out, 64, stage.length)
            shares = ", ".join(f"{distance}: {accuracy:.2f}" for distance, accuracy in found.items())
            tqdm.write(f"step {step + 1}: loss {loss:.3f}, values {value_loss:.3f}, retrieval {shares}")


def save_state(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], log: list[dict[str, float]]
) -> None:
    """Store all that `load_state` needs to go on: float32 weights, optimizers, log."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": states, "log": log}, path)


def load_state(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> list[dict[str, float]]:
    """Fill the model and the optimizers from `save_state`'s file, and return the log."""
    state = torch.load(path, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["log"]


def save(model: LlamaForCausalLM, path: Path) -> None:
    """Store a bfloat16 copy of the weights in the Hugging Face format."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner alone


def draw_training(log: Sequence[dict[str, float]], path: Path) -> None:
    """Plot the two losses over steps, smoothed; does nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    width = max(1, min(25, len(log) // 4))
    for key, label in (("loss", "source and lines"), ("value_loss", "retrieved values")):
        smooth = np.convolve([entry[key] for entry in log], np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(smooth)) + width, smooth, label=label)
    axes.set(xlabel="step", ylabel="training loss, nats per token", ylim=(0, 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=80)


# ---- evaluation


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, corpus: Corpus, length: int, limit: int) -> dict[str, float]:
    """Loss on the source of held-out modules in windows of `length` tokens, the first of each being `<s>`."""
    count = min(limit, len(corpus.ids)) // length
    windows = torch.from_numpy(corpus.ids[: count * length].reshape(count, length).copy())
    windows[:, 0] = corpus.ids[0]
    num_bytes = corpus.token_bytes[windows[:, 1:].numpy()].sum()
    total = sum(
        token_losses(model, window[None].to(model.device)).double().sum().item()
        for window in tqdm(windows, desc=f"held-out loss, {length}", leave=False)
    )
    tokens = count * (length - 1)
    return {
        "context": length,
        "tokens": tokens,
        "nats_per_token": total / tokens,
        "bits_per_byte": total / math.log(2) / num_bytes,
    }


@torch.inference_mode()
def retrieval(model: LlamaForCausalLM, corpus: Corpus, queries: int, length: int, seed: int = 1) -> dict[int, float]:
    """Accuracy of the greedy next token after `#get name`, by distance, over at least `queries` of each.

    Every sequence of `length` tokens holds as many pairs as in training, an equal number at each distance; the start of
    the next line decides, so a distance is met to within some twenty tokens.
    """
    distances = [d for d in DISTANCES if d < 0.97 * length]
    each = max(1, int(SHARE * length / 8) // len(distances))
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(distances, 0)
    asked = dict.fromkeys(distances, 0)
    with tqdm(total=queries, desc=f"retrieval, {length}", leave=False) as bar:
        while min(asked.values()) < queries:
            pairs = corpus.draw_pairs(rng, distances * each, length - 16)
            sample = corpus.plant(int(rng.integers(len(corpus.ids) - length)), length, pairs)
            ids = torch.from_numpy(sample.ids)[None].to(model.device)
            with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
                greedy = model(input_ids=ids, use_cache=False).logits[0, :-1].argmax(-1).cpu().numpy()
            right = greedy == sample.ids[1:]
            for distance in distances:
                at = sample.planted[1:] == distance
                hits[distance] += int(right[at].sum())
                asked[distance] += int(at.sum())
            bar.update(min(asked.values()) - bar.n)
    return {distance: hits[distance] / asked[distance] for distance in distances}


@torch.inference_mode()
def write_sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """A continuation of `prompt`, drawn at temperature 0.6."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.6, top_k=0)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Print, and return, the measures of the checkpoint that its README states."""
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = LlamaForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).to(args.device).eval()
    corpus = Corpus(tokenizer, held_out=True)
    losses = [held_out_loss(model, corpus, length, args.eval_tokens) for length in (1024, CONTEXT)]
    for entry in losses:
        print(
            f"held-out loss, context {entry['context']}: {entry['nats_per_token']:.3f} nats per token, "
            f"{entry['bits_per_byte']:.3f} bits per byte ({entry['tokens']:,} tokens)"
        )
    accuracy = retrieval(model, corpus, args.queries, CONTEXT)
    print(
        f"retrieval accuracy by distance (greedy, at least {args.queries} queries each, chance 1/{len(corpus.words)})"
    )
    for distance, value in accuracy.items():
        print(f"  {distance:>5} tokens  {value:6.1%}")
    text = write_sample(model, tokenizer, PROMPT, seed=0)
    print(f"sample:\n{text}\n({time.monotonic() - started:.0f} s)")
    report = {
        "held_out": losses,
        "retrieval": {"queries": args.queries, "chance": 1 / len(corpus.words), "accuracy": accuracy},
        "sample": text,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


def parse_args() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=here / "tiny-llama", help="folder to write or to evaluate")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    training = parser.add_argument_group("training")
    training.add_argument("--batch-scale", type=int, default=1, help="times as many sequences in every step")
    training.add_argument("--steps-scale", type=float, default=1.0, help="times as many steps in every stage")
    training.add_argument("--decay", type=int, default=200, help="steps over which the learning rate falls to 0")
    training.add_argument("--muon-lr", type=float, default=5e-3)
    training.add_argument("--adam-lr", type=float, default=5e-3)
    training.add_argument("--workers", type=int, default=2, help="threads, with a part of the batch each")
    training.add_argument("--value-weight", type=float, default=4.0, help="weight of a retrieved value in the loss")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--resume", action="store_true", help="go on from --state")
    training.add_argument("--state", type=Path, default=Path("train_tiny.pt"), help="weights, optimizers and log")
    training.add_argument("--save-every", type=int, default=100)
    training.add_argument("--check-every", type=int, default=100)
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--evaluate", action="store_true", help="measure the checkpoint instead of training")
    evaluation.add_argument("--queries", type=int, default=200, help="least number of queries per distance")
    evaluation.add_argument("--eval-tokens", type=int, default=131_072, help="tokens of held-out source to score")
    evaluation.add_argument("--json", type=Path, help="write the measures to this file too")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    if args.evaluate:
        evaluate(args)
    else:
        train(args)
        evaluate(args)


if __name__ == "__main__":
    main()
