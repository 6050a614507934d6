"""What the forkserver imports once, so that a rank starts in milliseconds."""

import contextlib

from tests import typed

typed.install("seqpar")

import pytest  # noqa: E402, F401
import torch.distributed.tensor  # noqa: E402, F401

import seqpar.comm  # noqa: E402

with contextlib.suppress(ImportError):
    import transformers.generation
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.mistral.modeling_mistral
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import seqpar.hf  # noqa: F401
