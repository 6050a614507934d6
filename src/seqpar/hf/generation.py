"""Hugging Face's `generate` on several ranks: the same call, the same random numbers, the same number of steps."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, MaxTimeCriteria

from seqpar import comm
from seqpar.comm import Groups
from seqpar.hf.agreed import agreed, check_same
from seqpar.hf.methods import method_of

__all__ = ["parallel_generate"]


def parallel_generate(model: Any, groups: Groups) -> Callable[..., Any]:
    """`model.generate` for ranks that share the model.

    It is Transformers' own, once all ranks have agreed that they were called alike, and have taken over the random
    state of rank 0, so that sampling draws the same tokens everywhere. Only `streamer` may differ: one rank prints.
    """
    plain = type(model).generate
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        content = b""
        with agreed(groups.flat):
            content = _check_call(model, signature.bind(model, *args, **kwargs).arguments)
        check_same("arguments of `generate`", content, group=groups.flat, device=model.device)
        _share_random_state(model.device, groups)
        return plain(model, *args, **kwargs)

    return method_of(model, generate)


def _check_call(model: Any, call: Mapping[str, Any]) -> bytes:
    """Refuse what ranks cannot do in step; all that decides the tokens, as bytes to compare."""
    options = {name: value for name, value in call.get("kwargs", {}).items() if "tokenizer" not in name}
    if options.get("cache_implementation") not in (None, "dynamic"):
        raise _refused("cache_implementation", "dynamic", options["cache_implementation"])
    config, inputs = model._prepare_generation_config(call.get("generation_config"), **options)
    _check_config(config)
    if call.get("synced_gpus"):
        raise _refused("synced_gpus", "left out, since ranks of one model take the same steps", True)
    if any(isinstance(criterion, MaxTimeCriteria) for criterion in call.get("stopping_criteria") or ()):
        raise _refused("stopping_criteria", "free of MaxTimeCriteria, since clocks of ranks differ", "one")
    if call.get("streamer") is not None and config.num_beams > 1:
        raise _refused("streamer", "left out in beam search", "one")
    content = [json.dumps(config.to_dict(), sort_keys=True, default=lambda value: type(value).__name__).encode()]
    for name, value in sorted({**inputs, "inputs": call.get("inputs")}.items()):
        if isinstance(value, Tensor):
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            content += [f"{name} {value.dtype} {tuple(value.shape)}".encode(), raw.numpy().tobytes()]
        elif isinstance(value, (bool, int, float, str)):
            content.append(f"{name} {value!r}".encode())
    return b"".join(content)


def _check_config(config: GenerationConfig) -> None:
    if config.max_time is not None:
        raise _refused("max_time", "None, since clocks of ranks differ", config.max_time)
    if config.cache_implementation not in (None, "dynamic"):
        raise _refused("cache_implementation", "dynamic", config.cache_implementation)
    if config.output_attentions:
        raise _refused("output_attentions", "False: attention weights are never formed", True)


def _refused(name: str, wanted: str, got: Any) -> ValueError:
    return ValueError(f"`{name}` must be {wanted}, got {got}")


def _share_random_state(device: torch.device, groups: Groups) -> None:
    """Take over rank 0's random state.

    Comm:  one broadcast of some 5 KB over all ranks.
    """
    parts = [torch.get_rng_state()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    shared = comm.broadcast(torch.cat(parts).to(device), src=0, group=groups.flat, label="generate").cpu()
    cpu, *cuda = shared.split([len(part) for part in parts])
    torch.set_rng_state(cpu.clone())
    for state in cuda:
        torch.cuda.set_rng_state(state.clone(), device)
