"""One cost model: it agrees with the parts it is made of, with the schedules that run, and with sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seqpar.partition import Interleave, Layout, Shift
from seqpar.plan import (
    HARDWARE,
    MACHINES,
    NETWORKS,
    Accelerator,
    Costs,
    Fabric,
    Grid,
    Hardware,
    Machine,
    Memory,
    Model,
    ModelShape,
    Options,
    StepWork,
    Tier,
    cost,
    makespan,
    prefill_costs,
    ring_seconds,
    step_seconds,
)
from seqpar.plan.costs import Prompt
from tests.kernels.own_errors import own_errors

SHAPE = ModelShape(8192, 80, 64, 8, 128, 28672)
LLAMA = Model(SHAPE, 128256, name="Llama-70B")
MIXTRAL = Model(ModelShape(4096, 32, 32, 8, 128, 14336), 32000, 8, 2, 14336, 32)
AROUND = ("embedding", "rows", "head", "logits", "engine", "stages")


def one_tier(machine: Machine) -> Hardware:
    """Hardware of nothing but a preset's accelerator and fabric."""
    fabric = machine.fabric
    return Hardware("one tier", machine.accelerator, (Tier("all", fabric.ranks, (fabric,), 0.0, fabric.bytes_per_s),))


def layers_s(found: object) -> float:
    return sum(part.seconds for part in found.parts if part.name not in AROUND)  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", [(1, 1), (8, 1), (4, 2), (1, 8)], ids=str)
def test_it_is_the_roofline_of_steps(layout: tuple[int, int]) -> None:
    """Where everything divides: prompts, and decodes with 1-byte weights."""
    machine = MACHINES["h200-x8"]
    plain = one_tier(machine)
    prompt = layers_s(cost(LLAMA, plain, Layout(*layout), [4096], options=Options()))
    pairs = Prompt(4096).pairs(0, 4096)
    assert prompt == pytest.approx(step_seconds(SHAPE, machine, Layout(*layout), StepWork(4096, pairs=pairs)))
    work = StepWork(64, cached=64 * 1000, decodes=64, rows=64)
    decode = layers_s(Costs(LLAMA, plain, Grid(*layout), Options(weight_itemsize=1)).breakdown(work))
    assert decode == pytest.approx(step_seconds(SHAPE, machine, Layout(*layout), work, weight_itemsize=1))


def test_it_is_the_roofline_of_prefills() -> None:
    """Slots in whole waves of tiles, sums, contention: as `prefill_costs` has them."""
    preset = MACHINES["h100-x8-multimem"]
    machine = Machine(replace(preset.accelerator, tile=(128, 128), kernel_s=2e-6), preset.fabric)
    wanted = prefill_costs(SHAPE, machine)
    found = Costs(LLAMA, one_tier(machine), Grid(8)).layer_costs()
    assert found.contention == wanted.contention
    for n in (2048, 8192, 32768):
        qkv, attention, o, mlp = found.chunk(Prompt(n), 0, n)
        first, second = wanted.chunk(Prompt(n), 0, n)
        assert qkv.compute_s + attention.compute_s + o.compute_s == pytest.approx(first.compute_s)
        assert mlp.compute_s == pytest.approx(second.compute_s)
        assert (qkv.comm_s, attention.comm_s, o.comm_s, mlp.comm_s) == pytest.approx(
            (0, 0, first.comm_s, second.comm_s)
        )


@pytest.mark.parametrize("grid", [Grid(8), Grid(2, 4), Grid(1, 8)], ids=str)
def test_chunks_take_turns_as_the_schedule_has_them(grid: Grid) -> None:
    hardware, cut = HARDWARE["h100"], Interleave(cuts=(1024,))
    model = replace(LLAMA, shape=replace(SHAPE, num_layers=9))
    found = cost(model, hardware, grid, [4096], options=Options(overlap=cut))
    layer = Costs(model, hardware, grid).layer_costs(most=4096)
    programs = [[*layer.chunk(Prompt(4096), a, b)] * 9 for a, b in ((0, 1024), (1024, 4096))]
    around = sum(part.seconds for part in found.parts if part.name in AROUND)
    contention = hardware.contention(1024 * 8192 * 2, grid.tp, grid.sp)
    assert found.total_s - around == pytest.approx(makespan(programs, contention=contention).total_s, rel=1e-6)
    serial = cost(model, hardware, grid, [4096])
    assert (found.hidden_s > 0) == (found.total_s < serial.total_s) == (grid.tp > 1)  # exchanges are too short to hide
    few = [1] * 8, [4096] * 8
    assert cost(LLAMA, hardware, grid, *few, options=Options(overlap=Interleave(2))).hidden_s == 0


def test_each_chunk_reads_the_keys_before_it() -> None:
    """Where reading takes all the time: the second of two halves reads all keys, the first half of them."""
    device = Accelerator("made up", 1e30, 1e9, 1, 1.0, 1.0)
    hardware = one_tier(Machine(device, Fabric(1, 0.0, 1.0)))
    whole, halves = (
        cost(LLAMA, hardware, Grid(), [4096], options=Options(overlap=overlap)) for overlap in (None, Interleave(2))
    )
    read = 80 * 4096 * 2 * 8 * 128 * 2 / 1e9
    weights = 80 * LLAMA.attention_parameters * 2 / 1e9 + LLAMA.mlp_parameters() * 2 / 1e9
    assert next(part.seconds for part in whole.parts if part.name == "attention, prompts") == pytest.approx(read)
    assert halves.total_s - whole.total_s == pytest.approx(read / 2 + weights)


def test_ring_prompts_and_local_decodes_exchange_heads() -> None:
    by_ring, by_heads = (
        cost(LLAMA, HARDWARE["h100"], Grid(2, 4), [1] * 4, [99] * 4, options=o)
        for o in (Options(prefill="ring"), Options())
    )
    assert by_ring.total_s == pytest.approx(by_heads.total_s) and by_ring.comm_s == pytest.approx(by_heads.comm_s)


def test_a_shift_takes_the_layout_that_it_says() -> None:
    rule = Shift.threshold(256, Layout(1, 8))
    both, tp, sp = (
        Costs(LLAMA, HARDWARE["h200"], grid, options)
        for grid, options in ((Grid(1, 8), Options(shift=rule)), (Grid(8), Options()), (Grid(1, 8), Options()))
    )
    for tokens, one in ((256, tp), (257, sp)):
        work = StepWork(tokens, rows=1)
        assert both.breakdown(work).layout == one.grid.layout
        assert both.seconds(work) == one.seconds(work)
    assert both.memory(0).weights == sp.memory(0).weights > 6 * tp.memory(0).weights
    assert both.kv_bytes == tp.kv_bytes == 2 * 80 * 128 * 2


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(wire="int8", overhead_s=1e-3),
        Options(overlap=Interleave(3, min_tokens=64), fused_norms=True),
        Options(decode="qship", weight_itemsize=1, kv_itemsize=1),
        Options(prefill="ring"),
    ],
    ids=["plain", "wire", "overlap", "qship", "ring"],
)
@pytest.mark.parametrize("model", [LLAMA, MIXTRAL], ids=["dense", "moe"])
def test_parts_add_up(model: Model, options: Options) -> None:
    """With what is hidden taken away, and the short way says the same."""
    for grid in (Grid(), Grid(4, 2), Grid(2, 2, 2)):
        costs = Costs(model, HARDWARE["a100"], grid, options)
        for work in (StepWork.of([1000, 1, 1], [24, 5000, 70]), StepWork.of([1] * 7, [300] * 7), StepWork.of([5], 0)):
            found = costs.breakdown(work)
            assert all(part.seconds > 0 and part.calls >= 1 for part in found.parts)
            assert sum(part.seconds for part in found.parts) - found.hidden_s == pytest.approx(found.total_s)
            assert costs.seconds(work) == pytest.approx(found.total_s)
            assert costs.stage_seconds(work) == pytest.approx(found.stage_s)
            assert found.stage_s < found.total_s if grid.pp > 1 else found.stage_s == found.total_s
            assert found.parts and str(found.work.tokens) in found.explain().replace(",", "")


def test_a_step_of_nothing_takes_nothing() -> None:
    assert Costs(LLAMA, HARDWARE["h100"], Grid(8), Options(overhead_s=1.0)).seconds(StepWork(0)) == 0


def test_products_come_in_waves_of_tiles() -> None:
    device = Accelerator("made up", 1e6, 1e12, 10, 0.5, 0.5, tile=(128, 128))
    wave = 10 * 2 * 128 * 128 * 100 / 0.5e6
    assert device.multiply_s(128, 1280, 100) == pytest.approx(wave)
    assert device.multiply_s(129, 1280, 100) == pytest.approx(2 * wave)
    assert device.multiply_s(128, 1281, 100) == pytest.approx(2 * wave)
    assert device.multiply_s(128, 640, 100) == pytest.approx(wave / 2)  # two processors share a tile
    assert device.multiply_s(3, 1280, 100) == pytest.approx(wave / 8)  # tiles of 16 rows
    assert device.multiply_s(128, 1280, 100, count=3) == pytest.approx(3 * wave)
    assert device.multiply_s(128, 1280, 100, 1) == pytest.approx(wave / 2)  # 8 bits, twice the rate
    slow = replace(device, hbm_bytes_per_s=1e3, hbm_efficiency=0.5)
    assert slow.product_s(1, 1280, 100) == pytest.approx(1280 * 100 * 2 / 500)
    assert slow.product_s(0, 1280, 100) == 0
    assert replace(device, fp8_flops=1e6).product_rate(1) == device.product_rate(2)


def test_experts_are_read_as_far_as_tokens_go_to_them() -> None:
    """One token reads two of eight; many read all, and take as long as a dense MLP of two experts' size."""
    device = Accelerator("made up", 1e12, 1e9, 1, 1.0, 1.0)
    hardware = one_tier(Machine(device, Fabric(1, 0.0, 1.0)))

    def seconds(tokens: int) -> float:
        return next(
            p.seconds for p in Costs(MIXTRAL, hardware, Grid()).breakdown(StepWork(tokens)).parts if p.name == "experts"
        )

    expert = 3 * 4096 * 14336
    assert seconds(1) == pytest.approx(32 * 2 * expert * 2 / 1e9)
    assert seconds(1 << 14) == pytest.approx(32 * 2 * (1 << 14) * 2 * expert / 1e12)
    assert 2 < seconds(8) / seconds(1) <= 4


def test_groups_span_tiers() -> None:
    """8 ranks in pairs of a host, hosts of 2: within, between and both ways, by hand."""
    near, far = Fabric(2, 1.0, 100.0), Fabric(2, 10.0, 10.0)
    hardware = Hardware(
        "pairs",
        HARDWARE["h100"].accelerator,
        (Tier("host", 2, (near,), 1.0, 50.0), Tier("net", None, (far,), 5.0, 10.0)),
    )
    assert hardware.all_reduce_s(1000, 1) == 0 == hardware.pass_s(1000, 1)
    assert hardware.all_reduce_s(1000, 2) == pytest.approx(1 + 1000 / 100)
    assert hardware.all_reduce_s(1000, 2, 2) == pytest.approx(10 + 1000 / 10)  # neighbours on other hosts
    # Half of it within each host, the other half summed between 4 hosts, and back.
    assert hardware.all_reduce_s(1000, 8) == pytest.approx(2 * (1 + 500 / 100) + 10 + 2 * 3 / 4 * 500 / 10)
    assert hardware.all_reduce_s(1, 8) == pytest.approx(10 + 2 * 7 / 8 / 10)  # one ring has fewer latencies
    assert hardware.pass_s(700, 8) == pytest.approx(10 + 600 / 10)
    assert hardware.message_s(100) == pytest.approx(1 + 2) and hardware.message_s(100, 2) == pytest.approx(5 + 10)
    switch = Fabric(2, 0.1, 100.0, all_to_all_alpha_s=float("inf"))
    both = Tier("host", 2, (near, switch), 1.0, 50.0)
    assert both.best(1000, 2) == switch and both.pass_s(100, 2) == pytest.approx(2)
    assert replace(hardware, tiers=(both,)).machine(2).fabric.exchange_alpha_s == 1.0


def test_ring_prefill_hides_hops_under_attention() -> None:
    """Between hosts a short prompt shows its hops, a long one does not."""
    options = Options(prefill="ring", near="tp")
    for tokens in (4096, 1 << 20):
        found = {
            part.name: part.seconds / 80
            for part in cost(LLAMA, HARDWARE["h100"], Grid(8, 4), [tokens], options=options).parts
        }
        step, hop = found["attention, prompts"] / 4, 20e-6 + tokens / 4 * 2 * 128 * 2 / 40e9
        assert found["attention, prompts"] + found.get("hops", 0) == pytest.approx(ring_seconds(step, hop, 4))
        assert ("hops" in found) == (hop > step)
        assert "exchange in" not in found


def test_tensor_parallel_neighbours_stay_on_their_host() -> None:
    near, far = (cost(LLAMA, HARDWARE["h100"], Grid(8, 2), [8192], options=Options(near=n)) for n in ("tp", "sp"))
    sums = [sum(part.seconds for part in each.parts if part.name == "sums") for each in (near, far)]
    assert sums[0] < 0.5 * sums[1]


def test_memory_by_hand() -> None:
    costs = Costs(LLAMA, HARDWARE["h100"], Grid(8), Options(memory_share=0.5))
    layers, table = 80 * (8192 * (80 + 64) * 128 + 3 * 8192 * 28672), 128256 * 8192
    assert costs.memory(0).weights == pytest.approx(2 * (layers + 2 * table) / 8)
    assert costs.memory(1000).kv == 1000 * costs.kv_bytes == 1000 * 2 * 80 * 128 * 2
    assert costs.memory(0).available == 0.5 * 80 * (1 << 30)
    fit = costs.tokens_that_fit(512)
    assert costs.memory(fit, 512).short == 0 < costs.memory(fit + 1, 512).short
    assert Memory(3.0, 2.0, 1.0, 5.0).short == 1.0 and Memory(3.0, 2.0, 1.0).short == 0
    half = Costs(LLAMA, HARDWARE["h100"], Grid(8), Options(weight_itemsize=1, kv_itemsize=1))
    assert half.kv_bytes == costs.kv_bytes / 2
    assert half.memory(0).weights == pytest.approx((layers + 4 * table) / 8)
    assert Costs(LLAMA, HARDWARE["h100"], Grid(4, 1, 2)).kv_bytes == costs.kv_bytes
    assert Costs(LLAMA, HARDWARE["h100"], Grid(1, 16)).kv_bytes == costs.kv_bytes  # KV heads are held twice
    spread = Options(decode="qship")
    assert Costs(LLAMA, HARDWARE["h100"], Grid(1, 16), spread).kv_bytes == costs.kv_bytes / 2


def test_what_is_refused() -> None:
    h100 = HARDWARE["h100"]
    for match, grid, options in (
        ("64 heads over at most as many ranks, got 128", (16, 8), Options()),
        ("`pp` must be at most the 80 layers", (1, 1, 81), Options()),
        ("`layout` must be tp, sp and pp", (0, 1), Options()),
        ("`shift` must be of the layout's 8 ranks", (4, 2), Options(shift=Shift.threshold(8, Layout(1, 4)))),
    ):
        with pytest.raises(ValueError, match=match):
            cost(LLAMA, h100, grid, [8], options=options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most the 8 ranks that H200 alone joins, got 16; give it a network"):
        cost(LLAMA, replace(h100, name="H200 alone", tiers=h100.tiers[:1]), Grid(16), [8])
    with own_errors():
        for changes, match in (
            ({"wire": "int3"}, "wire"),
            ({"prefill": "star"}, '`prefill` must be "ulysses" or "ring"'),
            ({"decode": "move"}, '`decode` must be "local" or "qship"'),
            ({"weight_itemsize": 3}, "must be 1, 2 or 4"),
            ({"overhead_s": -1.0}, "`overhead_s` must be >= 0"),
            ({"memory_share": 0.0}, r"in \(0, 1\]"),
        ):
            with pytest.raises(ValueError, match=match):
                Options(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="increasing multiples"):
        replace(h100, tiers=(h100.tiers[1], h100.tiers[0]))
    with pytest.raises(ValueError, match="`fabrics` must not be empty"):
        Tier("none", 2, (), 0.0, 1.0)
    with pytest.raises(ValueError, match="`message_s` must be >= 0"):
        replace(h100.tiers[0], message_s=-1.0)
    with pytest.raises(ValueError, match="`memory_bytes` must be >= 0"):
        replace(h100.accelerator, memory_bytes=-1.0)


def test_presets() -> None:
    """Every one costs a step on 16 ranks, says where its numbers are from, and faster memory decodes faster."""
    small = Model(ModelShape(4096, 32, 32, 8, 128, 14336), 128256)
    times = {}
    for name, hardware in HARDWARE.items():
        times[name] = cost(small, hardware, Grid(), [1] * 4, [512] * 4).total_s
        assert cost(small, hardware, Grid(16), [64]).comm_s > 0
        assert hardware.accelerator.source and hardware.accelerator.memory_bytes > 2e10 and hardware.name == name
        assert all(fabric.source for tier in hardware.tiers for fabric in tier.fabrics)
    assert (
        times["b200"] < times["mi300x"] < times["h200"] < times["h100"] < times["a100"] < times["4090"] < times["a6000"]
    )
    slow = HARDWARE["h100"].over(NETWORKS["ethernet-100"])
    assert slow.all_reduce_s(1e8, 16) > 5 * HARDWARE["h100"].all_reduce_s(1e8, 16)
    assert slow.all_reduce_s(1e8, 8) == HARDWARE["h100"].all_reduce_s(1e8, 8)
