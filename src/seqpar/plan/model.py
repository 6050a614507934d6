"""A model as the plan needs it: its sizes, read from a Hugging Face `config.json`, and what a step of it has to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from seqpar.plan.costs import Prompt
from seqpar.plan.hardware import Number
from seqpar.plan.prefill import ModelShape

__all__ = ["FAMILIES", "Model", "StepWork"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
"""Values of `model_type` that a config may have."""

_WINDOWED = ("mistral", "mixtral", "qwen3_moe")  # a `sliding_window` is every layer's
_EXPERTS = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}


@dataclass(frozen=True)
class StepWork:
    """What a step has to do, over all requests and ranks: all that its cost depends on.

    Args:
        tokens: new tokens, of prompts and decodes.
        pairs: queries of prompts times the keys that each sees, which cost compute.
        cached: keys that decodes read, over all of them, which cost memory traffic.
        keys: keys that prompts read, over all of them, their own included.
        decodes: requests with one new token behind cached ones.
        rows: tokens whose logits are wanted.
    """

    tokens: int
    pairs: Number = 0
    cached: Number = 0
    keys: Number = 0
    decodes: int = 0
    rows: int = 0

    @classmethod
    def of(cls, lens_new: Sequence[int], lens_cached: Sequence[int] | int = 0, window: int | None = None) -> StepWork:
        """Of requests with so many new tokens each behind so many cached ones; logits of the last token of each.

        Raises:
            ValueError: a negative length, a request without new tokens, or lengths of different numbers of requests.
        """
        cached = (lens_cached,) * len(lens_new) if isinstance(lens_cached, int) else tuple(lens_cached)
        if len(cached) != len(lens_new) or min(lens_new, default=1) < 1 or min(cached, default=0) < 0:
            raise ValueError(
                "`lens_new` must be at least 1 and `lens_cached` at least 0, one for each request, got "
                f"{list(lens_new)} and {list(cached)}"
            )
        prompts = [(new, old) for new, old in zip(lens_new, cached, strict=True) if new > 1 or not old]
        decodes = [old for new, old in zip(lens_new, cached, strict=True) if new == 1 and old]
        most = window - 1 if window else None
        seen = sum(old + 1 if most is None else min(old, most) + 1 for old in decodes)
        wholes = Prompt([new for new, _ in prompts], [old for _, old in prompts], window)
        keys = sum(new + (old if most is None else min(old, most)) for new, old in prompts)
        return cls(
            sum(lens_new), wholes.pairs(0, wholes.num_tokens), seen, keys, decodes=len(decodes), rows=len(lens_new)
        )


@dataclass(frozen=True)
class Model:
    """A Llama-family decoder, dense or a mixture of experts.

    Args:
        shape: of a layer, and how many there are; its intermediate size is that of dense layers.
        vocab_size: rows of the embedding and of the head.
        num_experts: of a layer with a mixture; 0 for none.
        experts_per_token: that each token goes to.
        expert_size: intermediate size of an expert.
        moe_layers: layers that have a mixture instead of an MLP.
        window: keys that a token sees in windowed layers, itself included; None for all.
        windowed_layers: how many those are.
        tied: the head shares the embedding's weights.
        gated: the MLP has three matrices, not two.
        name: for people.

    Raises:
        ValueError: sizes that are none, or a mixture without its sizes.
    """

    shape: ModelShape
    vocab_size: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    moe_layers: int = 0
    window: int | None = None
    windowed_layers: int = 0
    tied: bool = False
    gated: bool = True
    name: str = "model"

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"`vocab_size` and `window` must be at least 1, got {self.vocab_size} and {self.window}")
        if not (0 <= self.moe_layers <= self.num_layers and 0 <= self.windowed_layers <= self.num_layers):
            raise ValueError(
                f"`moe_layers` and `windowed_layers` must lie in 0 to {self.num_layers}, got {self.moe_layers} and "
                f"{self.windowed_layers}"
            )
        if self.moe_layers and not (1 <= self.experts_per_token <= self.num_experts and self.expert_size >= 1):
            raise ValueError(
                "a mixture must have at least as many experts as a token goes to, at least 1, of a size of at least 1, "
                f"got {self.num_experts}, {self.experts_per_token} and {self.expert_size}"
            )

    @classmethod
    def from_config(cls, config: str | PathLike[str] | Mapping[str, Any], *, name: str | None = None) -> Model:
        """Read a Hugging Face `config.json`: its path, that of the directory that holds it, or what it holds.

        Args:
            config: the path, or the content.
            name: for people; by default the directory's, or the family's.

        Raises:
            ValueError: no such file, no JSON, an unknown family, a size that is missing or none.
        """
        if not isinstance(config, Mapping):
            path = Path(config)
            path = path / "config.json" if path.is_dir() else path
            name = name or (path.parent.name if path.name == "config.json" else path.stem)
            config = _read(path)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"`model_type` must be one of {', '.join(FAMILIES)}, got {family!r}")
        try:
            return cls._from_fields(config, family, name or family)
        except KeyError as missing:
            raise ValueError(f"`config` must have the sizes of a {family} model, got none named {missing}") from None
        except TypeError as error:
            raise ValueError(f"`config` must have numbers for the sizes of a {family} model: {error}") from None

    @classmethod
    def _from_fields(cls, config: Mapping[str, Any], family: str, name: str) -> Model:
        shape = ModelShape.from_config(config)
        count, window = shape.num_layers, config.get("sliding_window")
        windowed = count if window and family in _WINDOWED else 0
        if window and family in ("qwen2", "qwen3") and config.get("use_sliding_window"):
            kinds = config.get("layer_types")
            windowed = kinds[:count].count("sliding_attention") if kinds else count - int(config["max_window_layers"])
        experts, per_token, size, mixtures = 0, 0, 0, 0
        if family in _EXPERTS:
            of, sized = _EXPERTS[family]
            experts, per_token, size = int(config[of]), int(config["num_experts_per_tok"]), int(config[sized])
            dense, step = set(config.get("mlp_only_layers") or ()), int(config.get("decoder_sparse_step") or 1)
            mixtures = sum(at not in dense and (at + 1) % step == 0 for at in range(count))
        return cls(
            shape,
            int(config["vocab_size"]),
            experts,
            per_token,
            size,
            mixtures,
            int(window) if window and windowed else None,
            max(0, windowed),
            bool(config.get("tie_word_embeddings", False)),
            name=name,
        )

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def attention_parameters(self) -> int:
        """Of one layer's projections."""
        return self.shape.hidden_size * (self.shape.qkv_size + self.shape.num_heads * self.shape.head_dim)

    @property
    def matrices(self) -> int:
        """Of an MLP: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    def mlp_parameters(self, layers: int | None = None) -> int:
        """Of the MLPs and mixtures of all layers, or of that many, mixtures spread evenly among them."""
        layers = self.num_layers if layers is None else layers
        mixtures = -(-self.moe_layers * layers // self.num_layers)
        dense = self.matrices * self.shape.hidden_size * self.shape.intermediate_size
        mixture = self.num_experts * (self.matrices * self.expert_size + 1) * self.shape.hidden_size
        return (layers - mixtures) * dense + mixtures * mixture

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and the head."""
        return (1 if self.tied else 2) * self.vocab_size * self.shape.hidden_size

    @property
    def parameters(self) -> int:
        """All of them, but for norms."""
        return self.num_layers * self.attention_parameters + self.mlp_parameters() + self.embedding_parameters

    def work(self, lens_new: Sequence[int], lens_cached: Sequence[int] | int = 0) -> StepWork:
        """What a step of these requests has to do, in the mean over the layers: windowed ones see fewer keys."""
        full = StepWork.of(lens_new, lens_cached)
        if not self.windowed_layers:
            return full
        near = StepWork.of(lens_new, lens_cached, self.window)
        share = self.windowed_layers / self.num_layers
        pairs, cached, keys = (
            share * getattr(near, name) + (1 - share) * getattr(full, name) for name in ("pairs", "cached", "keys")
        )
        return StepWork(full.tokens, pairs, cached, keys, full.decodes, full.rows)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"`config` must be a file that can be read, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"`config` must hold JSON, got {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"`config` must hold a JSON object, got {path} with a {type(content).__name__}")
    return content
