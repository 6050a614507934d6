"""Plain forwards of a parallelized model: logits, hidden states, losses, gradients, hooks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from seqpar import comm, hf, layers
from seqpar.hf.cache import store_of
from tests.hf import versions
from tests.hf.tiny import ARCHITECTURES, exact_norms, left_padded, prompts, tiny_model
from tests.ranks import LAYOUTS, SMALL, run_mesh, thinned

NAME = "tp={0[0]}-sp={0[1]}".format
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 on both sides: some 1e-13 of rounding in values of order 1


def sides(mesh: comm.DeviceMesh, kind: str, **options: Any) -> tuple[Any, Any, hf.Parallelized]:
    """The same model twice, one of them parallelized; norms in float64 on both sides."""
    sharded = options.pop("sequence_sharded", False)
    model, reference = tiny_model(kind, **options), tiny_model(kind, **options)
    if options.get("dtype", torch.float64) == torch.float64:
        exact_norms(reference)
    return reference, model, hf.parallelize(model, mesh, sequence_sharded=sharded)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Transformers' loss, which itself rounds the logits to float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_and_gradients(mesh: comm.DeviceMesh, kind: str, sharded: bool) -> None:
    """Right-padded training step, hidden states in the loss too, the cache left at its default."""
    reference, model, parallel = sides(mesh, kind, sequence_sharded=sharded)
    ids = prompts(3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses, states = [], []
    for each in (reference, model):
        each.train()
        out = each(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        keep = mask.bool()
        states.append([state[keep] for state in out.hidden_states])
        loss = cross_entropy(out.logits, labels)
        torch.testing.assert_close(out.loss, loss.float(), rtol=1e-6, atol=0)
        losses.append(loss + sum(state[keep].square().mean() for state in out.hidden_states[1:]))
        losses[-1].backward()
        assert torch.isfinite(out.logits[keep]).all()
    torch.testing.assert_close(losses[1], losses[0], **EXACT)
    for found, expected in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    parallel.sync_gradients()
    for param in model.parameters():
        param.data = param.grad
    gathered = parallel.gather_state_dict()
    for name, param in reference.named_parameters():
        torch.testing.assert_close(gathered[name], param.grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", thinned(LAYOUTS, SMALL.__contains__), ids=NAME)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_hidden_states_and_all_gradients(kind: str, layout: tuple[int, int]) -> None:
    run_mesh(layout, loss_and_gradients, kind, False)


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (3, 1)], ids=NAME)
def test_sequence_sharded_activations(layout: tuple[int, int]) -> None:
    run_mesh(layout, loss_and_gradients, "qwen3", True)


def gradients_of_embeddings(mesh: comm.DeviceMesh) -> None:
    reference, model, _ = sides(mesh, "llama")
    grads = []
    for each in (reference, model):
        embeds = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        embeds.requires_grad_()
        each(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-7)


def test_inputs_embeds() -> None:
    run_mesh((2, 2), gradients_of_embeddings)


def rows_asked_for(mesh: comm.DeviceMesh) -> None:
    """Every form of `logits_to_keep`, and only those rows travel."""
    reference, model, _ = sides(mesh, "llama")
    ids, mask = left_padded(prompts(3, 6), (0, 2, 4))
    chosen = torch.zeros(3, 6, dtype=torch.bool)
    chosen[0, 2] = chosen[1, 5] = chosen[2, 4] = chosen[2, 5] = True
    forms = [0, 1, 2, 6, 9, torch.tensor([5, 4]), torch.tensor([-1])]
    by_row = [torch.tensor([[5], [4], [5]]), chosen]
    with torch.no_grad():
        if versions.TAKES_ROWS:
            forms += by_row
        else:
            for keep in by_row:
                with comm.record() as counts, pytest.raises(ValueError, match="`logits_to_keep` must have one dim in"):
                    model(ids, attention_mask=mask, logits_to_keep=keep)
                assert not counts.counts
        for keep in forms:
            expected = reference(ids, attention_mask=mask, logits_to_keep=keep).logits
            with comm.record() as counts:
                found = model(ids, attention_mask=mask, logits_to_keep=keep).logits
            real = torch.ones_like(expected[..., 0], dtype=torch.bool)
            if not isinstance(keep, Tensor):
                real = mask[:, -keep:].bool()
            torch.testing.assert_close(found[real], expected[real], **EXACT)
            sent, rows = counts.by_label(), found[..., 0].numel()
            if keep is chosen:
                continue
            assert sent["lm_head"].num_bytes == rows * model.lm_head.rows.size * 8
            assert sent["model"].num_bytes <= rows * 48 * 8
        last = model(ids, attention_mask=mask, logits_to_keep=1, output_hidden_states=True)
        assert last.logits.shape == (3, 1, 67) and last.hidden_states[-1].shape == (3, 6, 48)
        assert (model(ids, attention_mask=mask).logits[mask == 0] == 0).all()


def test_logits_to_keep() -> None:
    run_mesh((1, 2), rows_asked_for)


def other_forms(mesh: comm.DeviceMesh) -> None:
    """Positional arguments, tuples, some hidden states, packed sequences, gaps in the mask, a bool mask."""
    reference, model, _ = sides(mesh, "llama")
    ids, positions = prompts(2, 6), torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 0, 1]])
    gaps = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        plain = reference(ids).logits
        torch.testing.assert_close(model(ids, None, None, None, None, None, None, 2).logits, plain[:, -2:], **EXACT)
        torch.testing.assert_close(model(ids, return_dict=False)[0], plain, **EXACT)
        torch.testing.assert_close(model.model(ids, return_dict=False)[0], reference.model(ids)[0], **EXACT)
        assert model(ids, use_cache=False).past_key_values is None
        for call in ({"position_ids": positions, "use_cache": False}, {"position_ids": positions[1:]}):
            torch.testing.assert_close(model(ids, **call).logits, reference(ids, **call).logits, **EXACT)
        for mask in (gaps, gaps.bool(), gaps.float()):
            found, expected = (each(ids, attention_mask=mask).logits[gaps.bool()] for each in (model, reference))
            torch.testing.assert_close(found, expected, **EXACT)
        labels = ids.masked_fill(ids < 9, -100)
        for call in ({"num_items_in_batch": torch.tensor(5)}, {"shift_labels": ids}):
            losses = [each(ids, labels=labels, **call).loss for each in (model, reference)]
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        assert model(ids, output_hidden_states=0).hidden_states is None
        for which in (True, 1, -1, [0, -2], [7]):
            found = model(ids, output_hidden_states=which).hidden_states
            expected = versions.hidden_states(reference, ids, which)
            assert [state is None for state in found] == [state is None for state in expected]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, **EXACT)


def test_other_forms_of_a_call() -> None:
    run_mesh((2, 1), other_forms)


def precision(mesh: comm.DeviceMesh, kind: str, dtype: torch.dtype) -> None:
    """Our error against float64 is at most twice that of Transformers in the same dtype, in the mean over logits."""
    exact = exact_norms(tiny_model(kind))
    reference, model, _ = sides(mesh, kind, dtype=dtype)
    ids = prompts(4, 12)
    for each in (exact, reference, model):
        each.requires_grad_(False)
    exact.load_state_dict({name: weight.double() for name, weight in reference.state_dict().items()})
    truth = exact(ids).logits
    ours, theirs = ((each(ids).logits.double() - truth).abs().mean() for each in (model, reference))
    assert model(ids).logits.dtype == dtype
    assert ours <= 2 * theirs + 1e-9, (ours, theirs)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=NAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_precision(kind: str, dtype: torch.dtype, layout: tuple[int, int]) -> None:
    run_mesh(layout, precision, kind, dtype)


class LowRank(nn.Module):
    """What PEFT does to a linear: call it, and add a product of two thin matrices."""

    def __init__(self, base: nn.Module, m: int, n: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.base = base
        self.down = nn.Parameter(torch.randn(2, m, dtype=torch.float64, generator=generator))
        self.up = nn.Parameter(torch.randn(n, 2, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base(x, *args, **kwargs) + x @ self.down.T @ self.up.T


def hooks_and_wrappers(mesh: comm.DeviceMesh) -> None:
    reference, model, parallel = sides(mesh, "llama")
    ids = prompts(2, 5)
    seen: list[str] = []
    watched = [name for name, _ in model.named_modules() if name and not name.endswith(".layers")]
    for name in watched:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, **EXACT)
    assert set(watched) == set(seen), set(watched) - set(seen)

    mlp = model.model.layers[1].mlp
    mlp.gate_up_proj = LowRank(mlp.gate_up_proj, 48, mlp.gate_up_proj.weight.shape[0])
    wrapper = mlp.gate_up_proj
    theirs = reference.model.layers[1].mlp
    blocks, rows = mlp.gate_up_proj.base.sources(), {}
    for which in ("gate_proj", "up_proj"):
        rows[which] = torch.zeros(83, 2, dtype=torch.float64)
        for piece in blocks[f"{which}.weight"].pieces:
            rows[which][piece.full.start : piece.full.stop] = wrapper.up.data[piece.local.start : piece.local.stop]
        comm_sum = comm.all_reduce(rows[which], group=parallel.groups.tp)
        delta = LowRank(getattr(theirs, which), 48, 83)
        delta.up.data = comm_sum
        setattr(theirs, which, delta)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, **EXACT)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=NAME)
def test_hooks_fire_and_a_wrapped_linear_works(layout: tuple[int, int]) -> None:
    run_mesh(layout, hooks_and_wrappers)


def refusals(mesh: comm.DeviceMesh) -> None:
    model = tiny_model("mistral", attention_dropout=0.1)
    hf.parallelize(model, mesh)
    ids = prompts(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    gap = mask.clone()
    gap[1, 3] = 0
    filled = DynamicCache()
    filled.update(torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16), 0)
    padded, two_layers = hf.ParallelCache(), hf.ParallelCache()
    store_of(two_layers, 2)
    with torch.no_grad():
        model(ids, attention_mask=left_padded(ids, (0, 3))[1], past_key_values=padded)
    longer = torch.ones(2, 9, dtype=torch.long)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"attention_mask": mask[:, None, None]},
            ValueError,
            "`attention_mask` must have shape [2, 8] (cached and new",
        ),
        (
            {"attention_mask": {"full_attention": mask}},
            TypeError,
            "`attention_mask` must be a tensor of shape [2, 8], got dict",
        ),
        ({"attention_mask": mask[:, :5]}, ValueError, "`attention_mask` must have shape [2, 8] (cached and new"),
        ({"attention_mask": mask * 2}, ValueError, "`attention_mask` must hold zeros and ones, got other values"),
        ({"attention_mask": mask * 0}, ValueError, "`attention_mask` must keep at least one of the new tokens"),
        ({"attention_mask": gap}, ValueError, "`attention_mask` must have no zeros between tokens of a request longer"),
        ({"output_attentions": True}, ValueError, "`output_attentions` must be False: attention weights are never"),
        ({"is_causal": False}, ValueError, "`is_causal` must be True, got False"),
        ({"cu_seq_lens_q": mask}, TypeError, "`cu_seq_lens_q` must not be given to a parallelized model, got Tensor"),
        ({"token_type_ids": mask}, TypeError, "`token_type_ids` must not be given to a parallelized model"),
        ({"position_ids": mask[0]}, ValueError, "`position_ids` must have shape [2, 8], got [8]"),
        ({"position_ids": mask.float()}, TypeError, "`position_ids` must be an integer tensor"),
        ({"past_key_values": filled}, ValueError, "`past_key_values` must be filled by this model, got a DynamicCache"),
        ({"past_key_values": ((None, None),)}, TypeError, "`past_key_values` must be a ParallelCache or an empty"),
        (
            {"past_key_values": StaticCache(model.config, max_cache_len=8)},
            TypeError,
            "`past_key_values` must be a ParallelCache or an empty DynamicCache, got StaticCache",
        ),
        (
            {"past_key_values": DynamicCache(offloading=False), "input_ids": ids.float()},
            TypeError,
            "`input_ids` must be an integer tensor, got torch.float32",
        ),
        (
            {"past_key_values": two_layers},
            ValueError,
            "`past_key_values` must have the model's 3 layers, got 2",
        ),
        ({"past_key_values": padded}, ValueError, "`attention_mask` must be given, since the cache was filled with"),
        (
            {"past_key_values": padded, "attention_mask": longer, "input_ids": ids[:, :1]},
            ValueError,
            "`attention_mask` must agree with what was cached in its first 8 columns",
        ),
        (
            {"past_key_values": hf.ParallelCache(num_pages=3, page_size=4)},
            ValueError,
            "out of pages: the new tokens must fit into the free pages (3 of 3, 4 tokens each), got 4",
        ),
        ({"input_ids": None}, ValueError, "exactly one of `input_ids` and `inputs_embeds` must be given"),
        ({"input_ids": ids[0]}, ValueError, "`input_ids` must have shape [B, S], got [8]"),
        ({"input_ids": ids + 67}, ValueError, "`input_ids` must lie in [0, 67), got values in ["),
        ({"input_ids": None, "inputs_embeds": ids}, TypeError, "`inputs_embeds` must be a floating-point tensor"),
        (
            {"logits_to_keep": -1},
            ValueError,
            "`logits_to_keep` must be a number of rows or a tensor of indices, got -1",
        ),
        (
            {"labels": ids, "attention_mask": left_padded(ids, (0, 3))[1]},
            ValueError,
            "`labels` must be -100 where the token that predicts them is padding",
        ),
    ]
    for options, kind, message in cases:
        with comm.record() as sent, pytest.raises(kind) as error, torch.no_grad():
            model(**{"input_ids": ids, **options})
        assert message in str(error.value), (message, str(error.value))
        assert not sent.counts, (message, sent.table())
    with comm.record() as sent:
        with pytest.raises(ValueError, match=r"`attention_dropout` must be 0 in training, got 0\.1"):
            model.train()(ids)
        model.eval()
        with pytest.raises(
            ValueError, match="`past_key_values` must be empty where gradients are wanted, got 8 cached"
        ):
            model(ids, attention_mask=torch.cat([left_padded(ids, (0, 3))[1], mask], 1), past_key_values=padded)
    assert not sent.counts, sent.table()
    with pytest.raises(ValueError, match="not compatible with gradient checkpointing"):
        versions.enable_checkpointing(model)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=NAME)
def test_what_it_cannot_honour_is_refused_by_name_and_nothing_is_sent(layout: tuple[int, int]) -> None:
    run_mesh(layout, refusals)


def refuses_ids(mesh: comm.DeviceMesh) -> None:
    """Only the second sequence rank would embed the bad id."""
    model = tiny_model("llama")
    hf.parallelize(model, mesh)
    ids = prompts(1, 4)
    ids[0, -1] = 67
    with (
        comm.record() as sent,
        pytest.raises(ValueError, match=r"`input_ids` must lie in \[0, 67\), got values in \[\d+, 67\]"),
    ):
        model(ids)
    assert not sent.counts, sent.table()


def test_a_bad_id_is_an_error_on_every_rank() -> None:
    run_mesh((1, 2), refuses_ids)


def crops(mesh: comm.DeviceMesh) -> None:
    """A cropped cache that holds no padding any more needs no mask, and an empty one takes any number of requests."""
    reference, model, _ = sides(mesh, "llama")
    ids = prompts(2, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        for columns, given in ((4, prompts(2, 4, seed=3)), (6, prompts(2, 4, seed=4)), (6, prompts(3, 4, seed=5))):
            cache = DynamicCache()
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.crop(-columns)
            whole = torch.cat([ids[:, : 6 - columns], given], 1) if columns < 6 else given
            found, expected = model(given, past_key_values=cache).logits, reference(whole).logits[:, -4:]
            torch.testing.assert_close(found, expected, **EXACT)
        cache = DynamicCache()
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0]))
        found = model(given[:1], past_key_values=cache).logits
        torch.testing.assert_close(found, reference(torch.cat([ids[:1], given[:1]], 1)).logits[:, -4:], **EXACT)


def test_a_cache_without_padding_needs_no_mask() -> None:
    run_mesh((1, 2), crops)


def survives_a_refused_step(mesh: comm.DeviceMesh) -> None:
    """A step that failed after it was given room in the cache leaves nothing behind."""
    reference, model, _ = sides(mesh, "llama")
    ids = prompts(2, 8)
    cache = hf.ParallelCache()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with torch.no_grad():
        for given, count in ((torch.cat([ids, ids]), 0), (ids, 3)):
            hook = model.model.layers[1].register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                model(given, past_key_values=cache)
            hook.remove()
            if not count:
                model(ids[:, :3], past_key_values=cache)
        found = model(ids[:, 3:], past_key_values=cache).logits
        torch.testing.assert_close(found, reference(ids).logits[:, 3:], **EXACT)


def test_a_refused_step_is_not_cached() -> None:
    run_mesh((1, 1), survives_a_refused_step)


def test_layers_hold_what_the_demo_shows() -> None:
    """The flat names that `layers` promises are those of the unswapped model."""
    model = tiny_model("qwen2")
    names = {name for name, _ in model.named_parameters()}
    run_mesh((1, 1), has_names, names)


def has_names(mesh: comm.DeviceMesh, names: set[str]) -> None:
    model = tiny_model("qwen2")
    parallel = hf.parallelize(model, mesh)
    assert names == {name for name, *_ in layers.iter_sources(model)}
    assert set(model.state_dict()) == set(tiny_model("qwen2").state_dict()) == names | {"lm_head.weight"}
    assert parallel.weight_bytes == sum(p.numel() * 8 for p in tiny_model("qwen2").parameters())
    assert parallel.kv_token_bytes == 2 * 3 * 4 * 8 * 8
    assert model.device == torch.device("cpu") and model.dtype == torch.float64
    assert model.get_input_embeddings() is model.model.embed_tokens
