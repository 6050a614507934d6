"""Rotary embeddings: tables bit for bit those of Transformers, rotation by its laws and against Llama's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from seqpar.kernels import RopeConfig, rope_table, rotary
from tests.kernels.own_errors import own_errors

BACKENDS = ["torch", "reference"]
HEAD_DIM, LONGEST = 32, 256

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default-theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    "yarn-shrinks": {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64},
    "yarn-step": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 8,
        "beta_slow": 8,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i / 8 for i in range(HEAD_DIM // 2)],
        "long_factor": [1.0 + i for i in range(HEAD_DIM // 2)],
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [2.0] * (HEAD_DIM // 2),
    },
    "longrope-shrinks": {
        "rope_type": "longrope",
        "factor": 0.5,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [2.0] * (HEAD_DIM // 2),
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def configs(name: str) -> tuple[LlamaConfig, RopeConfig]:
    parameters = {"rope_theta": 10000.0, **PARAMETERS[name]}
    theirs = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        rope_parameters=dict(parameters),
    )
    return theirs, RopeConfig.from_dict(parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("seq_len", [None, 16, 64, 65, LONGEST, LONGEST + 1, 1000])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_those_of_transformers(name: str, seq_len: int | None) -> None:
    theirs, ours = configs(name)
    if ours.rope_type == "default":
        want, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        length = torch.tensor(seq_len) if seq_len and ours.rope_type == "dynamic" else seq_len  # what the models pass
        want, scaling = ROPE_INIT_FUNCTIONS[ours.rope_type](theirs, "cpu", seq_len=length)
    assert ours.attention_scaling == scaling
    torch.testing.assert_close(ours.inv_freq(seq_len), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [10, 64, 100, 300])
@pytest.mark.filterwarnings("ignore")
def test_tables_are_those_of_a_model(name: str, dtype: torch.dtype, length: int) -> None:
    theirs, ours = configs(name)
    positions = torch.arange(length).flip(0)
    want = LlamaRotaryEmbedding(theirs)(torch.zeros(1, dtype=dtype), positions[None])
    for got, table in zip(rope_table(ours, positions, dtype=dtype, seq_len=length), want, strict=True):
        torch.testing.assert_close(got, table[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_only_two_types_depend_on_the_length(name: str) -> None:
    _, ours = configs(name)
    changes = not torch.equal(ours.inv_freq(16), ours.inv_freq(1000))
    assert ours.depends_on_length == changes


def test_partial_rotation_has_the_frequencies_of_fewer_dims() -> None:
    half = RopeConfig(HEAD_DIM, partial_rotary_factor=0.5)
    assert half.rotary_dim == HEAD_DIM // 2
    assert torch.equal(half.inv_freq(), RopeConfig(HEAD_DIM // 2).inv_freq())


def test_a_config_is_hashable_and_reads_the_older_spelling() -> None:
    old = RopeConfig.from_dict({"type": "linear", "factor": 2.0}, head_dim=8)
    assert old == RopeConfig(8, rope_type="linear", factor=2.0) and len({old, old}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rope_type": "spiral"},
            "`rope_type` must be one of default, linear, dynamic, yarn, longrope, llama3, got 'spi",
        ),
        ({"rope_type": "linear"}, "`rope_type` 'linear' needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor, original_max_position_emb"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 8}, "'yarn' needs max_position_embeddings"),
        ({"partial_rotary_factor": 0.3}, "must be an even number of dims, got 9"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0],
                "long_factor": [1.0],
                "original_max_position_embeddings": 8,
                "factor": 2.0,
            },
            r"`short_factor` must have one entry per pair \(16\), got 1",
        ),
        ({"mrope_section": [1, 2, 3]}, "`parameters` must be rope parameters known here, got mrope_section"),
    ],
)
@own_errors()
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_dict(options, head_dim=HEAD_DIM)


def inputs(dtype: torch.dtype, tokens: int = 6, heads: int = 3, dim: int = 16) -> tuple[torch.Tensor, ...]:
    """A column slice of a wider buffer, with tables."""
    fused = torch.randn(tokens, 2 * heads + 1, dim).to(dtype)
    return fused[:, 1::2], *rope_table(RopeConfig(dim), torch.arange(tokens) * 7, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reference_is_llama(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(dtype)
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    got = rotary(x, cos, sin, backend="reference")
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(tokens=st.integers(0, 5), heads=st.integers(0, 4), dim=st.sampled_from([2, 6, 16, 64]))
@settings(max_examples=40, deadline=None)
def test_torch_is_the_reference(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    x, cos, sin = inputs(dtype, tokens, heads, dim)
    before = x.clone()
    got = rotary(x, cos, sin, backend="torch")
    want = rotary(x.double(), cos.double(), sin.double(), backend="reference")
    # two products and their sum, each rounded once, of at most |x| * sqrt(2)
    bound = 2 * torch.finfo(dtype).eps * float(x.abs().max() if x.numel() else 0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    assert got.dtype == dtype and got.is_contiguous() and torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quarter_turns_are_exact(backend: str) -> None:
    x = torch.arange(24.0).view(1, 3, 8)
    zero, one = torch.zeros(1, 8), torch.ones(1, 8)
    torch.testing.assert_close(rotary(x, one, zero, backend=backend), x, rtol=0, atol=0)
    want = torch.cat((-x[..., 4:], x[..., :4]), -1)
    torch.testing.assert_close(rotary(x, zero, one, backend=backend), want, rtol=0, atol=0)
    distinct = torch.arange(8.0)[None]
    want = torch.cat((-x[..., 4:] * distinct[:, :4], x[..., :4] * distinct[:, 4:]), -1)
    torch.testing.assert_close(rotary(x, zero, distinct, backend=backend), want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dims_beyond_the_tables_pass_through(backend: str) -> None:
    x = torch.randn(5, 2, 12)
    cos, sin = rope_table(RopeConfig(12, partial_rotary_factor=0.5), torch.arange(5))
    got = rotary(x, cos, sin, backend=backend)
    assert torch.equal(got[..., 6:], x[..., 6:])
    torch.testing.assert_close(got[..., :6], rotary(x[..., :6], cos, sin, backend=backend), rtol=0, atol=0)


@given(near=st.integers(0, 50), apart=st.integers(0, 50), shift=st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_scores_depend_on_the_distance_alone(near: int, apart: int, shift: int) -> None:
    rng = torch.Generator().manual_seed(near)
    q, k = torch.randn(2, 1, 1, 16, generator=rng, dtype=torch.float64)

    def score(base: int) -> torch.Tensor:
        (cos, sin), (far_cos, far_sin) = (
            rope_table(RopeConfig(16), torch.tensor([at]), dtype=torch.float64) for at in (base, base + apart)
        )
        return (rotary(q, far_cos, far_sin) * rotary(k, cos, sin)).sum()

    torch.testing.assert_close(score(near), score(near + shift), rtol=0, atol=1e-3)  # angles are float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    x, cos, sin = (t.double().requires_grad_() for t in (torch.randn(3, 2, 6), torch.randn(3, 4), torch.randn(3, 4)))
    torch.autograd.gradcheck(lambda *args: rotary(*args, backend=backend), (x, cos, sin))


@pytest.mark.parametrize(("cos", "sin"), [((3, 8), (3, 8)), ((4, 7), (4, 7)), ((4, 10), (4, 10)), ((4, 8), (4, 6))])
@own_errors()
def test_bad_input_is_refused(cos: tuple[int, int], sin: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"`cos` and `sin` must be \[4 tokens, even number of dims <= 8\], got"):
        rotary(torch.zeros(4, 2, 8), torch.zeros(cos), torch.zeros(sin))
