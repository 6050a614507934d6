"""What composes with what: for each layer and each circumstance the test that shows it, or the refusal.

`python -m tests.composition` writes the table into `docs/composition.md`; `tests/test_composition.py` checks that no
cell is missing, that tests exist, that refusals are raised, and that the page is the one made from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "composition.md"
BEGIN, END = "<!-- begin of the generated table -->", "<!-- end of the generated table -->"


@dataclass(frozen=True)
class Tested:
    """By these tests: file below `tests/`, two colons, name."""

    tests: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """By an error, of which this is the message; `tests.test_composition.REFUSALS` raises it."""

    name: str


@dataclass(frozen=True)
class NoArgument:
    """There is nothing to ask for it with: `where` ("forward" or "__init__") has no such argument."""

    argument: str
    where: str = "forward"


Cell = Tested | Refused | NoArgument

COLUMNS = (
    *("tp", "sp", "tp x sp", "other layouts", "tokens over tp", "wire"),
    *("float64", "float32", "bfloat16", "float16"),
    *("training", "cache", "compiled", "CUDA graph", "FSDP, DDP", "Hugging Face"),
)

REFUSALS = {
    "segments": "`root` must hold a layer with named segments, got ... without; products, attention and experts run as "
    "they are",
    "graph": "`modules` must be layers that a graph can hold, got ..., ...; run its steps eagerly",
    "overlapped tokens": "`sequence_sharded` must be False for a layer that cuts its own tokens, got True",
    "qship gradient": "`qkv` must need no gradient, got one that does; use torch.no_grad(), or Ulysses to train",
    "csa gradient": "`q`, `k`, `v` and the cached keys must need no gradient, got one that does; use "
    "torch.no_grad(), or RingAttention to train",
    "stage gradient": "a stage must run without gradients, got weights that want some; use torch.no_grad()",
}


def t(*tests: str) -> Tested:
    return Tested(tests)


LINEAR, DECODER, SHIFT = "layers/test_linear.py", "layers/test_decoder.py", "layers/test_shift.py"
PARITY = f"{DECODER}::test_equals_one_process_forward_and_backward"
VIEWS = f"{SHIFT}::test_every_layout_multiplies_by_views_of_one_storage"
CACHED = f"{DECODER}::test_chunked_prefill_and_decode_over_a_cache"
WIRES = "layers/test_wire.py::test_a_decoder_layer_sends_all_in_the_format"
TRAINS = "layers/test_fsdp.py::test_twenty_steps_over_an_outer_axis_are_those_of_one_process"
SHARDED = "layers/test_fsdp.py::test_every_layer_with_parameters_is_sharded_over_an_outer_axis"
COMPILED = "layers/test_segments.py::test_segments_compile_whole_and_give_the_same"
GRAPH = "test_cuda.py::test_chunks_of_a_prompt_in_a_graph_equal_the_same_chunks_one_after_another"
STEPPED = "comm/test_graphs.py::test_steps_by_graphs_equal_eager_ones_whatever_their_size"
HELD = "test_composition.py::test_steps_of_graphs_hold_these_layers"
MODEL = "hf/test_forward.py::test_loss_hidden_states_and_all_gradients"
SERVED = "hf/test_attend.py::test_greedy_tokens_of_the_bundled_model"
ALL_DTYPES = ("float32", "bfloat16", "float16")

COMPILES_NOT, GRAPHS_NOT = Refused("segments"), Refused("graph")


def dtypes(name: str) -> dict[str, Cell]:
    return {dtype: t(f"layers/test_dtypes.py::{name}") for dtype in ALL_DTYPES}


def layouts(test: str) -> dict[str, Cell]:
    """A test of layouts with tp, with sp and with both, in float64."""
    return {"tp": t(test), "sp": t(test), "tp x sp": t(test), "float64": t(test)}


IN_DECODER: dict[str, Cell] = {
    **layouts(PARITY),
    **dtypes("test_decoder_layers"),
    "other layouts": t(VIEWS),
    "tokens over tp": t(PARITY),
    "wire": t(WIRES),
    "training": t(PARITY),
    "cache": t(CACHED),
    "compiled": t(COMPILED),
    "CUDA graph": t(GRAPH, STEPPED),
    "FSDP, DDP": t(TRAINS),
    "Hugging Face": t(MODEL),
}
"""What holds of a decoder layer and of the parts that it is made of."""

A_LINEAR: dict[str, Cell] = {**IN_DECODER, "cache": NoArgument("kv"), "compiled": COMPILES_NOT}
PAIR = f"{LINEAR}::test_column_and_row_equal_the_unsharded_pair_exactly"
VOCABULARY = f"{LINEAR}::test_vocabulary_need_not_divide"
CORE: dict[str, Cell] = {
    **dtypes("test_attention"),
    "tokens over tp": NoArgument("sequence_sharded", "__init__"),
    "FSDP, DDP": t(SHARDED),
}
PLACED = "layers/test_placed.py::test_prompts_and_decodes_share_a_striped_cache"
RING, USP, CSA = "layers/test_ring.py", "layers/test_usp.py", "layers/test_csa.py"
MOE, QSHIP, STAGE = "layers/test_moe.py", "layers/test_qship.py", "layers/test_pipeline.py"
OVERLAP, PIPELINED = "layers/test_overlap.py", "layers/test_threephase.py"
ATTENDS = f"{OVERLAP}::test_attention_equals_the_one_that_does_not_overlap"

LAYERS: dict[str, dict[str, Cell]] = {
    "ColumnParallelLinear": {**A_LINEAR, **layouts(PAIR), "tokens over tp": t(PAIR), "training": t(PAIR)},
    "RowParallelLinear": {**A_LINEAR, **layouts(PAIR), "tokens over tp": t(PAIR), "training": t(PAIR)},
    "GateUpParallelLinear": A_LINEAR,
    "QKVParallelLinear": A_LINEAR,
    "VocabParallelEmbedding": {
        **layouts(VOCABULARY),
        **dtypes("test_embedding_and_head"),
        "other layouts": t(f"{SHIFT}::test_any_layout_serves_any_step"),
        "tokens over tp": NoArgument("sequence_sharded", "__init__"),
        "wire": NoArgument("wire", "__init__"),
        "training": t(VOCABULARY),
        "cache": NoArgument("kv"),
        "compiled": COMPILES_NOT,
        "CUDA graph": t(HELD),
        "FSDP, DDP": t(SHARDED),
        "Hugging Face": t(MODEL),
    },
    "ParallelLMHead": {
        **layouts(VOCABULARY),
        **dtypes("test_embedding_and_head"),
        "other layouts": NoArgument("layout"),
        "tokens over tp": NoArgument("sequence_sharded", "__init__"),
        "wire": NoArgument("wire", "__init__"),
        "training": t(VOCABULARY),
        "cache": NoArgument("kv"),
        "compiled": COMPILES_NOT,
        "CUDA graph": t(HELD),
        "FSDP, DDP": t(SHARDED),
        "Hugging Face": t(MODEL),
    },
    "RMSNorm": {
        **IN_DECODER,
        "other layouts": NoArgument("layout"),
        "tokens over tp": t(PARITY),
        "wire": NoArgument("wire", "__init__"),
        "cache": NoArgument("kv"),
    },
    "ParallelMLP": {
        **IN_DECODER,
        **layouts("layers/test_ulysses.py::test_mlp_alone_equals_one_process"),
        "cache": NoArgument("kv"),
    },
    "OverlappedMLP": {
        **layouts(f"{OVERLAP}::test_equals_the_mlp_that_does_not_overlap_exactly"),
        **dtypes("test_layers_that_cut_their_own_tokens"),
        "other layouts": t("layers/test_dtypes.py::test_layers_that_cut_their_own_tokens_in_other_layouts"),
        "tokens over tp": Refused("overlapped tokens"),
        "wire": t("layers/test_wire.py::test_the_overlapped_mlp_is_the_plain_one_on_its_parts"),
        "training": t("layers/test_dtypes.py::test_layers_that_cut_their_own_tokens"),
        "cache": NoArgument("kv"),
        "compiled": t("layers/test_segments.py::test_segments_of_layers_that_cut_their_own_tokens"),
        "CUDA graph": t(HELD),
        "FSDP, DDP": t(SHARDED),
        "Hugging Face": NoArgument("OverlappedMLP", "hf"),
    },
    "ParallelMoE": {
        **layouts(f"{MOE}::test_equals_one_process_forward_and_backward"),
        **dtypes("test_decoder_layers"),
        "other layouts": t(f"{MOE}::test_every_reachable_layout_runs_on_what_is_stored"),
        "tokens over tp": t(f"{MOE}::test_in_a_decoder_layer_with_tails"),
        "wire": t(f"{MOE}::test_wire_formats"),
        "training": t(f"{MOE}::test_equals_one_process_forward_and_backward"),
        "cache": NoArgument("kv"),
        "compiled": COMPILES_NOT,
        "CUDA graph": GRAPHS_NOT,
        "FSDP, DDP": t(SHARDED),
        "Hugging Face": t("hf/test_moe.py::test_greedy_tokens_of_a_left_padded_batch"),
    },
    "UlyssesAttention": {
        **CORE,
        **layouts("layers/test_ulysses.py::test_attention_alone_equals_one_process"),
        "other layouts": t(f"{SHIFT}::test_any_layout_serves_any_step"),
        "wire": t(WIRES),
        "training": t("layers/test_ulysses.py::test_attention_alone_equals_one_process"),
        "cache": t(CACHED),
        "compiled": t(COMPILED),
        "CUDA graph": t(GRAPH, STEPPED),
        "FSDP, DDP": t(TRAINS),
        "Hugging Face": t(MODEL),
    },
    "PipelinedUlysses": {
        **CORE,
        **layouts(f"{PIPELINED}::test_equals_one_process_forward_and_backward"),
        "other layouts": t(f"{PIPELINED}::test_other_layouts_of_the_same_ranks"),
        "wire": t(f"{PIPELINED}::test_wire_formats_apply_to_parts"),
        "training": t(f"{PIPELINED}::test_equals_one_process_forward_and_backward"),
        "cache": t(f"{PIPELINED}::test_equals_plain_ulysses_over_a_cache"),
        "compiled": t("layers/test_segments.py::test_segments_of_layers_that_cut_their_own_tokens"),
        "CUDA graph": GRAPHS_NOT,
        "Hugging Face": t("hf/test_pipeline.py::test_pipelined_attention_gives_what_the_whole_gives"),
    },
    "RingAttention": {
        **CORE,
        **layouts(f"{RING}::test_equals_one_process_forward_and_backward"),
        "tp": t(f"{RING}::test_composes_with_tensor_parallel_heads"),
        "tp x sp": t(f"{RING}::test_composes_with_tensor_parallel_heads"),
        "other layouts": NoArgument("layout"),
        "wire": t(f"{RING}::test_wire_formats_round_what_travels_and_send_fewer_bytes"),
        "training": t(f"{RING}::test_equals_one_process_forward_and_backward"),
        "cache": t(f"{RING}::test_chunks_of_prompts_over_a_striped_cache"),
        "compiled": COMPILES_NOT,
        "CUDA graph": GRAPHS_NOT,
        "Hugging Face": t(SERVED),
    },
    "USPAttention": {
        **CORE,
        **layouts(f"{USP}::test_equals_one_process_forward_and_backward"),
        "tp": t(f"{USP}::test_composes_with_tensor_parallel_heads"),
        "tp x sp": t(f"{USP}::test_composes_with_tensor_parallel_heads"),
        "other layouts": NoArgument("layout"),
        "wire": t(f"{USP}::test_a_wire_format_is_that_of_all_that_travels_forward"),
        "training": t(f"{USP}::test_equals_one_process_forward_and_backward"),
        "cache": t(f"{USP}::test_chunks_of_prompts_over_a_striped_cache"),
        "compiled": COMPILES_NOT,
        "CUDA graph": GRAPHS_NOT,
        "Hugging Face": NoArgument("USPAttention", "hf"),
    },
    "CSAAttention": {
        **CORE,
        **layouts(f"{CSA}::test_whole_keys_are_exact"),
        "tp": t(f"{CSA}::test_composes_with_tensor_parallel_heads"),
        "tp x sp": t(f"{CSA}::test_composes_with_tensor_parallel_heads"),
        "other layouts": NoArgument("layout"),
        "wire": NoArgument("wire", "__init__"),
        "training": Refused("csa gradient"),
        "FSDP, DDP": Refused("csa gradient"),
        "cache": t(f"{CSA}::test_leaves_striped_keys_behind_and_decodes_over_them"),
        "compiled": COMPILES_NOT,
        "CUDA graph": GRAPHS_NOT,
        "Hugging Face": t("hf/test_attend.py::test_sparse_prompts_that_leave_nothing_out"),
    },
    "PlacedCore": {
        **CORE,
        **layouts(PLACED),
        "tp": t("layers/test_dtypes.py::test_attention"),
        "other layouts": NoArgument("layout"),
        "wire": NoArgument("wire", "__init__"),
        "training": t("hf/test_attend.py::test_gradients_through_a_ring"),
        "cache": t(PLACED),
        "compiled": t("layers/test_segments.py::test_segments_of_layers_that_cut_their_own_tokens"),
        "CUDA graph": GRAPHS_NOT,
        "Hugging Face": t(SERVED),
    },
    "QShipDecodeAttention": {
        **CORE,
        **layouts(f"{QSHIP}::test_decodes_equal_one_process"),
        **dtypes("test_decodes_that_ship_queries"),
        "other layouts": t(f"{QSHIP}::test_decodes_equal_one_process"),
        "wire": t(f"{QSHIP}::test_a_wire_format_rounds_what_travels_once"),
        "training": Refused("qship gradient"),
        "FSDP, DDP": Refused("qship gradient"),
        "cache": t(f"{QSHIP}::test_decodes_equal_one_process"),
        "compiled": t("layers/test_segments.py::test_segments_of_layers_that_cut_their_own_tokens"),
        "CUDA graph": GRAPHS_NOT,
        "Hugging Face": t(SERVED),
    },
    "ParallelAttention": {
        **IN_DECODER,
        "tokens over tp": t(PARITY),
    },
    "OverlappedAttention": {
        **layouts(ATTENDS),
        **dtypes("test_layers_that_cut_their_own_tokens"),
        "other layouts": t("layers/test_dtypes.py::test_layers_that_cut_their_own_tokens_in_other_layouts"),
        "tokens over tp": Refused("overlapped tokens"),
        "wire": t("layers/test_dtypes.py::test_layers_that_cut_their_own_tokens_in_a_wire_format"),
        "training": t(ATTENDS),
        "cache": t(ATTENDS),
        "compiled": t("layers/test_segments.py::test_segments_of_layers_that_cut_their_own_tokens"),
        "CUDA graph": GRAPHS_NOT,
        "FSDP, DDP": t(SHARDED),
        "Hugging Face": NoArgument("OverlappedAttention", "hf"),
    },
    "ParallelDecoderLayer": IN_DECODER,
    "PipelineStage": {
        **layouts("hf/test_stage.py::test_any_company_through_stages"),
        **dtypes("test_stages"),
        "other layouts": NoArgument("layout"),
        "tokens over tp": NoArgument("sequence_sharded", "__init__"),
        "wire": NoArgument("wire", "__init__"),
        "training": Refused("stage gradient"),
        "cache": t("hf/test_stage.py::test_any_company_through_stages"),
        "compiled": COMPILES_NOT,
        "CUDA graph": GRAPHS_NOT,
        "FSDP, DDP": Refused("stage gradient"),
        "Hugging Face": t("hf/test_stage.py::test_any_company_through_stages"),
    },
}


def named_tests(layers: dict[str, dict[str, Cell]]) -> list[str]:
    """Every test named, once, in the order of the table."""
    found = [
        test
        for row in layers.values()
        for column in COLUMNS
        if isinstance(row[column], Tested)
        for test in row[column].tests
    ]
    return list(dict.fromkeys(found))


def table() -> str:
    """The table, then the tests and refusals that its cells point to."""
    tests = named_tests(LAYERS)

    def shown(cell: Cell) -> str:
        if isinstance(cell, Tested):
            return " ".join(f"[T{tests.index(test) + 1}](#t{tests.index(test) + 1})" for test in cell.tests)
        if isinstance(cell, Refused):
            number = list(REFUSALS).index(cell.name) + 1
            return f"[R{number}](#r{number})"
        return "–"

    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    lines += [
        f"| `{name}` | " + " | ".join(shown(row[column]) for column in COLUMNS) + " |" for name, row in LAYERS.items()
    ]
    lines += ["", "**Tested** by:", ""]
    lines += [f'* <a id="t{number}"></a>T{number}: `tests/{test}`' for number, test in enumerate(tests, 1)]
    lines += ["", "**Refused**, with this message:", ""]
    lines += [f'* <a id="r{number}"></a>R{number}: {text}' for number, text in enumerate(REFUSALS.values(), 1)]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table of now."""
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{table()}\n{END}{text.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
