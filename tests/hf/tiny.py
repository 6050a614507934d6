"""Tiny random models of every supported architecture, in float64 so that tokens can be compared exactly."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

SHAPES: dict[str, dict[str, Any]] = {
    # grouped heads that no group of four ranks divides; F and V that nothing divides
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "attention_bias": True},
    # one KV head for five query heads, head_dim not hidden / heads, a window shorter than the prompts
    "mistral": {
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "hidden_size": 40,
        "head_dim": 16,
        "sliding_window": 5,
    },
    # MHA, bias on q, k, v, tied embeddings, windows in the upper layers only
    "qwen2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 32,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    # q/k norm, more dims in the heads than in the model
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 24, "head_dim": 6},
}
MIXTURES: dict[str, dict[str, Any]] = {
    # five experts, which no group divides; a window in every layer
    "mixtral": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 24,
        "intermediate_size": 13,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    # a dense layer between two of experts, fewer experts than four ranks; weights that do not sum to one
    "qwen3_moe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 20,
        "head_dim": 6,
        "moe_intermediate_size": 11,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
    },
}
ARCHITECTURES = tuple(SHAPES)


def tiny_config(kind: str, **overrides: Any) -> PretrainedConfig:
    """A config with three layers and a vocabulary of 67."""
    common = {
        "vocab_size": 67,
        "intermediate_size": 83,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(kind, **{**common, **(SHAPES | MIXTURES)[kind], **overrides})


def random_overrides(kind: str, draw: random.Random, ranks: int) -> dict[str, Any]:
    """A random shape of that architecture with at least one query head for each rank."""
    kv_heads = draw.randint(1, 4)
    heads = kv_heads * draw.randint(-(-ranks // kv_heads), -(-ranks // kv_heads) + 2)
    head_dim = 2 * draw.randint(1, 6)
    overrides: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "intermediate_size": draw.randint(1, 90),
        "num_hidden_layers": draw.randint(1, 3),
        "vocab_size": draw.randint(12, 90),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if kind in ("mistral", "qwen3"):
        overrides["hidden_size"] = draw.randint(8, 60)
    if kind == "mistral":
        overrides["sliding_window"] = draw.choice([None, draw.randint(1, 10)])
    if kind in ("qwen2", "qwen3"):
        overrides |= {"use_sliding_window": True, "sliding_window": draw.randint(1, 10), "max_window_layers": 1}
    if kind in ("llama", "qwen3"):
        overrides["attention_bias"] = draw.random() < 0.5
    if kind == "llama":
        overrides["mlp_bias"] = draw.random() < 0.5
    if kind == "qwen2":
        del overrides["head_dim"]
    return overrides


def tiny_model(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 1, **overrides: Any) -> Any:
    """A model whose every weight, norms and biases included, is random: the same on every rank."""
    config = tiny_config(kind, **overrides)
    if kind in MIXTURES:
        config._experts_implementation = "eager"  # Transformers' other ones do not take float64
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        nn.init.zeros_(param)
        param.data += 0.3 * noise + (1.0 if param.dim() == 1 and param.shape[0] > 83 else 0.0)
    return model.eval()


def exact_norms(model: Any) -> Any:
    """Let Transformers' norms compute in float64, where they would round to float32 on the way."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_exact_norm, module)
    return model


def _exact_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def prompts(batch: int, length: int, *, vocab: int = 67, seed: int = 0) -> torch.Tensor:
    """Random token ids, the same on every rank."""
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, pads: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids with 0 in the first `pads[i]` places of row i, and the mask."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask
