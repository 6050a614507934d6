"""The three-phase pipeline under Hugging Face's own forward and `generate`: nothing changes but the order of work."""

from __future__ import annotations

import pytest
import torch

from seqpar import comm
from seqpar.hf import parallelize
from seqpar.partition import Interleave, ThreePhase
from tests.hf.test_overlap import padded
from tests.hf.tiny import exact_norms, tiny_model
from tests.kernels.own_errors import own_errors
from tests.ranks import run_mesh


def same(mesh: comm.DeviceMesh, kind: str, overlap: Interleave | str) -> int:
    """Hidden states, a loss's gradients and generated tokens; collectives of the prefill's layers."""
    model, oracle, inputs = tiny_model(kind), exact_norms(tiny_model(kind)), padded()
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = oracle(**inputs, output_hidden_states=True)
    tokens = oracle.generate(**inputs, max_new_tokens=6, do_sample=False)
    pipeline = ThreePhase(2, 2, min_tokens=4)
    with parallelize(model, mesh, pipeline=pipeline, overlap=overlap):
        with torch.no_grad():
            for use_cache in (True, False):
                with comm.record() as sent:
                    out = model(**inputs, output_hidden_states=True, use_cache=use_cache)
                torch.testing.assert_close(out.logits[keep], expected.logits[keep], rtol=1e-9, atol=1e-10)
                for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
                    torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-9, atol=1e-10)
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
        ids = inputs["input_ids"]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.seqpar.sync_gradients()
        grad = model.model.layers[0].self_attn.qkv_proj.weight.grad
        assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0
    torch.testing.assert_close(loss, oracle(ids, labels=ids).loss, rtol=1e-9, atol=1e-10)
    return sum(c.calls for (op, label), c in sent.counts.items() if op == "all_to_all" and ".layers." in label)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", (1, 2)), ("llama", (2, 1)), ("qwen3", (1, 3)), ("mistral", (2, 2))],
    ids=["llama-sp2", "llama-tp2", "qwen3-sp3", "mistral-tp2-sp2"],
)
def test_pipelined_attention_gives_what_the_whole_gives(kind: str, layout: tuple[int, int]) -> None:
    assert min(run_mesh(layout, same, kind, "off")) >= (layout[1] > 1) * 3 * (2 + 2 + 2)


def test_pipelines_nest_in_chunks() -> None:
    run_mesh((1, 2), same, "llama", Interleave(2, min_tokens=4))


def refusals(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("llama")
    with own_errors(), pytest.raises(TypeError, match="`pipeline` must be a ThreePhase or None, got True"):
        parallelize(model, mesh, pipeline=True)


def test_what_is_no_pipeline_is_refused() -> None:
    run_mesh((1, 2), refusals)
