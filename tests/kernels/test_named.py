"""FlashInfer and flash-attn behind the seam, by fakes that have their signatures and compute in float64.

The fakes know nothing but their arguments: tables, lengths, scales and windows as the packages' documentation has them
(FlashInfer and flash-attn 2.8, August 2026), masses in the base and the order that the packages return.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from math import log
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from seqpar.kernels import attention, choose_backend
from seqpar.kernels.attention import named
from seqpar.kernels.tile import placed_attention
from seqpar.ragged import RaggedBatch
from tests.kernels.cases import Case
from tests.kernels.own_errors import own_errors


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """One request, q [s, h, d]: the last rows of k, v [n, g, d]; query i sees [i + n - s - left, i + n - s + right]."""
    s, n, ratio = len(q), len(k), q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(ratio, 1) for x in (k, v))
    scores = torch.einsum("shd,nhd->hsn", q.double(), keys) * scale
    at, key = torch.arange(s)[:, None] + n - s, torch.arange(n)
    hidden = (left >= 0) & (key < at - left) | (right >= 0) & (key > at + right)
    scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("hsn,nhd->shd", scores.softmax(-1), values)
    return out.to(q.dtype), scores.logsumexp(-1).T.float()


class Wrapper:
    """What FlashInfer's two wrappers have in common."""

    made: ClassVar[list[str]] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", **more: Any) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any()
        assert kv_layout == "NHD" and set(more) <= {"use_tensor_cores"}
        self.cores = more.get("use_tensor_cores", False)
        self.made.append(type(self).__name__)

    def keep(
        self,
        starts: Tensor,
        table: tuple[Tensor, Tensor, Tensor],
        sizes: tuple[int, int, int, int],
        sm_scale: float,
        window_left: int,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        assert all(x.dtype == torch.int32 and x.is_cpu for x in (starts, *table))
        indptr, indices, last = table
        assert len(indptr) == len(last) + 1 and indptr[-1] == len(indices)
        assert (last >= 1).all() and (last <= sizes[3]).all()
        assert self.cores == (type(self) is BatchDecodeWithPagedKVCacheWrapper and sizes[0] // sizes[1] >= 4)
        self.starts, self.table, self.sizes, self.dtypes = starts.tolist(), table, sizes, dtypes
        self.rule = sm_scale, window_left

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *args: Any, return_lse: bool = False, **more: Any
    ) -> tuple[Tensor, Tensor]:
        assert return_lse and not args and not more and q.dtype == self.dtypes[0]
        heads, kv_heads, dim, page_size = self.sizes
        k, v = paged_kv_cache
        assert q.shape[1:] == (heads, dim) and k.shape[1:] == v.shape[1:] == (page_size, kv_heads, dim)
        assert k.stride() == v.stride() and k.dtype == self.dtypes[1]
        indptr, indices, last = (x.tolist() for x in self.table)
        parts = []
        for request, (start, stop) in enumerate(pairwise(self.starts)):
            pages = indices[indptr[request] : indptr[request + 1]]
            count = (len(pages) - 1) * page_size + last[request] if pages else 0
            keys, values = (x[pages].flatten(0, 1)[:count] for x in (k, v))
            parts.append(attend(q[start:stop], keys, values, *self.rule, 0))
        out, lse = (torch.cat(each) for each in zip(*parts, strict=True))
        return out, lse / log(2)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        assert kv_data_type is not None and sm_scale is not None
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        self.keep(starts, (indptr, indices, last_page_len), sizes, sm_scale, window_left, (q_data_type, kv_data_type))


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert causal and kv_data_type is not None and sm_scale is not None
        table = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self.keep(qo_indptr, table, sizes, sm_scale, window_left, (q_data_type, kv_data_type))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    assert causal and return_attn_probs and softmax_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if max_seqlen_q == 1:  # what it does to decodes
        assert starts == list(range(len(starts)))
    assert max_seqlen_q >= max(b - a for a, b in pairwise(starts))
    assert max_seqlen_k >= max(b - a for a, b in pairwise(ends))
    Wrapper.made.append("varlen" if block_table is None else "varlen over pages")
    parts = []
    for request, (start, stop) in enumerate(pairwise(starts)):
        first, last = ends[request : request + 2]
        keys, values = k[first:last], v[first:last]
        if block_table is not None:
            keys, values = (paged(x, block_table[request], last - first) for x in (k, v))
        parts.append(attend(q[start:stop], keys, values, softmax_scale, window_size[0], 0))
    out, lse = (torch.cat(each) for each in zip(*parts, strict=True))
    return out, lse.T.contiguous(), None


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    assert causal and return_softmax_lse and softmax_scale is not None and k is None and v is None
    assert cache_seqlens is not None and cache_seqlens.dtype == torch.int32 and block_table is not None
    assert q.dim() == 4 and len(q) == len(cache_seqlens) == len(block_table)
    Wrapper.made.append("kvcache")
    parts = []
    for rows, table, count in zip(q, block_table, cache_seqlens.tolist(), strict=True):
        keys, values = (paged(x, table, count) for x in (k_cache, v_cache))
        parts.append(attend(rows, keys, values, softmax_scale, window_size[0], 0))
    return torch.stack([out for out, _ in parts]), torch.stack([lse.T for _, lse in parts])


def paged(x: Tensor, table: Tensor, count: int) -> Tensor:
    assert x.shape[1] % 256 == 0 and table.dtype == torch.int32
    return x[table.long()].flatten(0, 1)[:count]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages, on a CPU, with a workspace that costs nothing."""
    from seqpar.kernels.attention import flashinfer

    wrappers = BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
    functions = flash_attn_varlen_func, flash_attn_with_kvcache
    for name, parts in (("flashinfer", wrappers), ("flash_attn", functions)):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{part.__name__: part for part in parts}))
    monkeypatch.setattr(named, "DEVICES", {"cpu"})
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 16)
    Wrapper.made.clear()
    yield


GQA, UNEVEN = ((0, 0, 0, 0, 1, 1, 1, 1), 2), ((0, 1, 1), 2)


@pytest.mark.parametrize(
    ("backend", "case", "made"),
    [
        ("flashinfer", Case((1, 1), (20, 3), *GQA, 64, None, 5, 1), ["BatchDecodeWithPagedKVCacheWrapper"]),
        ("flashinfer", Case((1, 1), (9, 2), *UNEVEN, 64, 4, 1, 1), ["BatchDecodeWithPagedKVCacheWrapper"] * 2),
        ("flashinfer", Case((7, 0, 1), (4, 0, 30), *GQA, 64, 6, 8, 3), ["BatchPrefillWithPagedKVCacheWrapper"]),
        ("flashinfer", Case((5, 2), (0, 0), *GQA, 128, None, 0, 0), ["BatchPrefillWithPagedKVCacheWrapper"]),
        ("flash_attn", Case((1, 1), (300, 3), *GQA, 16, None, 256, 1), ["kvcache"]),
        ("flash_attn", Case((3, 3), (2, 260), *UNEVEN, 8, 5, 256, 1), ["kvcache"] * 2),
        ("flash_attn", Case((1, 0, 1), (4, 0, 30), *GQA, 16, 6, 256, 3), ["varlen over pages"]),
        ("flash_attn", Case((5, 2), (0, 0), *GQA, 16, None, 0, 0), ["varlen"]),
        ("flash_attn", Case((5, 1), (0, 300), *GQA, 16, 3, 512, 0), ["varlen over pages"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("sinks", [False, True])
def test_what_a_package_finds_is_the_definition(backend: Any, case: Case, made: list[str], sinks: bool) -> None:
    """Outputs in their order, masses in base e; a second layer of the same batch plans nothing again."""
    q, k, v, batch = case.inputs(torch.bfloat16)
    options: dict[str, Any] = {"window": case.window, "kv_head_of": case.kv_head_of, "softmax_scale": 0.3}
    if sinks:
        options["sinks"] = torch.linspace(-2, 3, q.shape[1], dtype=torch.float64)
    want = attention(q.double(), k.double(), v.double(), batch, backend="reference", **options)
    for _ in range(2):
        out, lse = attention(q, k, v, batch, backend=backend, **options)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert out.is_contiguous() and lse.is_contiguous()
        torch.testing.assert_close(out.double(), want[0], rtol=2**-7, atol=2**-7)  # rounded once, with sinks twice
        torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=1e-5)
    assert Wrapper.made == (made if backend == "flashinfer" else made * 2)


Q, K = torch.zeros(4, 4, 64, dtype=torch.bfloat16), torch.zeros(4, 2, 64, dtype=torch.bfloat16)
PAGES = torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16)
INFER, FLASH = ' for backend="flashinfer", got', ' for backend="flash_attn", got'


@pytest.mark.parametrize(
    ("backend", "q", "k", "options", "message"),
    [
        ("flashinfer", Q.float(), K.float(), {}, f"`q` and `k` must be bfloat16 or float16{INFER} torch.float32 and"),
        ("flash_attn", Q.double(), K.double(), {}, 'torch.float64 and torch.float64; backend="triton" takes them'),
        ("flashinfer", Q[..., :56], K[..., :56], {}, f"`q` must have a head_dim of 64, 128 or 256{INFER} 56; backend="),
        ("flash_attn", Q[..., :4], K[..., :4], {}, f"head_dim of a multiple of 8 up to 256{FLASH} 4; backend"),
        ("flash_attn", Q, K, {"deterministic": True}, "`deterministic` must be False for backend"),
        ("flashinfer", Q.clone().requires_grad_(), K, {}, f"must need no gradient{INFER} one that does; backend"),
        ("flashinfer", Q.mT.contiguous().mT, K, {}, "`q`, `k`, `v` must have unit stride in head_dim, and `k` and"),
    ],
)
@own_errors()
def test_what_they_do_not_take_is_refused_by_name(
    backend: Any, q: Tensor, k: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        attention(q, k, k, RaggedBatch.prefill([4]), backend=backend, **options)
    assert message in str(error.value)
    assert not Wrapper.made


@own_errors()
def test_pages_positions_and_devices_that_they_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = RaggedBatch.build([4], [4], [[0]], 16)
    with pytest.raises(ValueError, match=f'`batch` must have pages of a multiple of 256 tokens{FLASH} 16; backend="tr'):
        attention(Q, PAGES, PAGES, paged, backend="flash_attn")
    with pytest.raises(ValueError, match="and `k` and `v` the same strides, for backend"):
        attention(
            Q, K, torch.zeros(4, 4, 64, dtype=torch.bfloat16)[:, ::2], RaggedBatch.prefill([4]), backend="flash_attn"
        )
    positions = torch.arange(4), torch.arange(4)
    rule: dict[str, Any] = {"q_lens": (4,), "kv_lens": (4,), "softmax_scale": 1.0, "kv_head_of": (0, 0, 1, 1)}
    with pytest.raises(ValueError, match='must be one of "auto", "torch", "reference", "triton", got \'flashinfer\''):
        placed_attention(Q, K, K, positions=positions, backend="flashinfer", **rule)  # striped positions
    monkeypatch.setattr(named, "DEVICES", {"cuda"})
    with pytest.raises(ValueError, match=f'`q` must be on a GPU{INFER} cpu; backend="torch" takes it'):
        attention(Q, K, K, RaggedBatch.prefill([4]), backend="flashinfer")


@pytest.mark.parametrize(("backend", "install"), [("flashinfer", "flashinfer-python"), ("flash_attn", "flash-attn")])
@own_errors()
def test_what_is_not_installed_says_what_to_install(
    backend: Any, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)  # as Python remembers what is not there
    with pytest.raises(
        ValueError, match=f'`backend` must be one that is installed, got "{backend}" .*pip install {install}$'
    ):
        attention(Q, K, K, RaggedBatch.prefill([4]), backend=backend)


def test_auto_means_none_of_them() -> None:
    """Installed as they are."""
    assert choose_backend("attention", torch.device("cuda"), torch.bfloat16) == "triton"
