"""Which Transformers models can be parallelized, and what their configs say that the layers need to know."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from seqpar.hf.checkpoint import Names

__all__ = ["check_config", "check_model", "sliding_windows", "stored_names"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_MIXTURES = {  # where checkpoints hold a mixture of experts, and what the gate, up and down of one are called there
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
THE_MODEL = "the model"
_PLAIN = (
    "Linear",
    "Embedding",
    "ModuleList",
    "SiLU",
    "SiLUActivation",
)  # modules of torch and transformers.activations


def check_config(config: PretrainedConfig) -> None:
    """Refuse a config whose model would not be computed as Transformers does.

    Raises:
        ValueError: another architecture, activation or kind of layer, or quantized weights.
    """
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"`model_type` must be one of {', '.join(ARCHITECTURES)}, got {config.model_type}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("`quantization_config` must be absent, got quantized weights; load an unquantized checkpoint")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"`hidden_act` must be silu, got {config.hidden_act}")
    if not getattr(config, "is_causal", True):
        raise ValueError("`is_causal` must be True, got False")
    if getattr(config, "output_router_logits", False):
        raise ValueError("`output_router_logits` must be False: no rank holds all tokens' logits, got True")
    if getattr(config, "router_jitter_noise", 0):
        raise ValueError(
            f"`router_jitter_noise` must be 0, got {config.router_jitter_noise}; it is noise of training, set it so"
        )
    sliding_windows(config)


def sliding_windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """The keys that a token of each layer sees, itself included; None for all.

    Transformers masks keys at or before `query - sliding_window`, so its number is the same as ours.

    Raises:
        ValueError: a layer type that is neither full nor sliding attention.
    """
    count: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "llama":
        return (None,) * count
    if config.model_type in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * count
    kinds = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(config.layer_types) - kinds.keys())
    if unknown or (window is None and "sliding_attention" in config.layer_types):
        raise ValueError(
            f"`layer_types` must be full_attention, or sliding_attention with a `sliding_window`, "
            f"got {unknown or 'sliding_attention without one'}"
        )
    return tuple(kinds[kind] for kind in config.layer_types[:count])


def stored_names(name: str, shape: tuple[int, ...], model_type: str) -> Names:
    """What a checkpoint calls one of a model's tensors.

    Transformers holds the experts of a layer in two tensors, gate_up_proj[E, 2F, M] and down_proj[E, M, F]. Checkpoints
    hold three matrices of each, which it converts as it reads and writes them (its conversion_mapping).
    """
    layer, mlp, rest = name.partition(".mlp.")
    if model_type not in _MIXTURES or not mlp:
        return name
    block, (gate, up, down) = _MIXTURES[model_type]
    parts = {"experts.gate_up_proj": (gate, up), "experts.down_proj": (down,)}.get(rest)
    if parts is None:
        return f"{layer}.{block}.{rest}"
    return tuple(
        tuple(f"{layer}.{block}.experts.{expert}.{part}.weight" for part in parts) for expert in range(shape[0])
    )


def check_model(model: Any) -> None:
    """Refuse a model that slicing would change without a word.

    Raises:
        TypeError: it is no model of a supported class.
        ValueError: its config cannot be honoured, or something was wrapped around or hooked into it.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or name not in ARCHITECTURES.values():
        raise TypeError(f"`model` must be one of {', '.join(ARCHITECTURES.values())}, got {name}")
    if not type(model).__module__.startswith("transformers.models."):
        raise TypeError(f"`model` must be Transformers' own {name}, got {type(model).__module__}.{name}")
    if hasattr(model, "seqpar"):
        raise ValueError("`model` must not be parallelized already, got one that is; undo that first")
    check_config(model.config)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"`model` must lie on one device, got {model.hf_device_map}")
    for path, module in model.named_modules():
        _check_module(path or THE_MODEL, module, type(model).__module__)


def _check_module(path: str, module: nn.Module, home: str) -> None:
    """Refuse a module that is not what Transformers built: the swap would lose what was added."""
    kind = type(module)
    plain = kind.__module__.startswith(("torch.nn.", "transformers.")) and kind.__name__ in _PLAIN
    if kind.__module__ != home and not plain:
        raise ValueError(f"`{path}` must be unwrapped before the model is sliced, got {kind.__name__}")
    if getattr(module, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing must be off, got it on; call activation_checkpointing_disable(), "
            "or gradient_checkpointing_disable() where Transformers calls it so"
        )
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    added = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    added += [module.forward] if "forward" in module.__dict__ else []
    if added and path != THE_MODEL:  # hooks of the causal LM itself stay where they are
        raise ValueError(
            f"`{path}` must carry no hooks when it is swapped out, got {added[0]!r:.80}; register them afterwards"
        )
