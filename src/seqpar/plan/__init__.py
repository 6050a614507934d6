"""Decide by numbers: what schedules cost, measured or published, and which one to run.

Nothing here changes what a layer computes. A decision comes with its reasons (`explain`) and ends in plain numbers,
such as the cuts of a prompt, which a layer or `partition.Interleave` takes.
"""

from seqpar.plan.calibrate import calibrate
from seqpar.plan.calibrate_decode import calibrate_decode
from seqpar.plan.calibrate_layers import calibrate_layers, calibrate_layouts
from seqpar.plan.chunks import (
    balanced_chunk,
    kv_reread,
    most_requests,
    saturating_chunk,
    tbt_budget,
    tile_fit,
)
from seqpar.plan.cost import Breakdown, Costs, Grid, Memory, Options, Part, cost
from seqpar.plan.costs import Curve, LayerCosts, SlotCosts
from seqpar.plan.csa import strided_volumes
from seqpar.plan.decode import (
    DecodeChoice,
    DecodeCosts,
    MethodCosts,
    consolidation_steps,
    decode,
    decode_costs,
    decode_volumes,
    exchange_from,
)
from seqpar.plan.hardware import HARDWARE, MACHINES, NETWORKS, Accelerator, Fabric, Hardware, Machine, Tier
from seqpar.plan.helix import helix_volume
from seqpar.plan.model import FAMILIES, Model, StepWork
from seqpar.plan.operators import Around, Operators, Product
from seqpar.plan.overlap import Candidate, OverlapChoice, overlap
from seqpar.plan.pipeline import PipelineTimes, StageTimes, measured_pipeline, pipeline
from seqpar.plan.prefill import ModelShape, prefill_costs
from seqpar.plan.ring import RingCase, RingCosts, ring_costs, ring_method, ring_seconds, ring_volumes
from seqpar.plan.schedule import Schedule, Slot, bound, makespan, repeated_makespan
from seqpar.plan.shift import ShiftChoice, StepCosts, shift, undecided
from seqpar.plan.simulate import (
    Composed,
    Composer,
    Failure,
    Fleet,
    Live,
    Place,
    StepCost,
    Straggler,
    simulate,
)
from seqpar.plan.simulation import Served, Simulation, Spent, percentile
from seqpar.plan.steps import step_costs, step_seconds
from seqpar.plan.traffic import Arrival, make_trace, read_trace, write_trace
from seqpar.plan.tune import Plan, Saturated, Tuned, Workload, best, saturated
from seqpar.plan.usp import USPCosts, usp_costs, usp_volumes
from seqpar.plan.volumes import Volume, closed_volume, layer_volumes

__all__ = [
    "FAMILIES",
    "HARDWARE",
    "MACHINES",
    "NETWORKS",
    "Accelerator",
    "Around",
    "Arrival",
    "Breakdown",
    "Candidate",
    "Composed",
    "Composer",
    "Costs",
    "Curve",
    "DecodeChoice",
    "DecodeCosts",
    "Fabric",
    "Failure",
    "Fleet",
    "Grid",
    "Hardware",
    "LayerCosts",
    "Live",
    "Machine",
    "Memory",
    "MethodCosts",
    "Model",
    "ModelShape",
    "Operators",
    "Options",
    "OverlapChoice",
    "Part",
    "PipelineTimes",
    "Place",
    "Plan",
    "Product",
    "RingCase",
    "RingCosts",
    "Saturated",
    "Schedule",
    "Served",
    "ShiftChoice",
    "Simulation",
    "Slot",
    "SlotCosts",
    "Spent",
    "StageTimes",
    "StepCost",
    "StepCosts",
    "StepWork",
    "Straggler",
    "Tier",
    "Tuned",
    "USPCosts",
    "Volume",
    "Workload",
    "balanced_chunk",
    "best",
    "bound",
    "calibrate",
    "calibrate_decode",
    "calibrate_layers",
    "calibrate_layouts",
    "closed_volume",
    "consolidation_steps",
    "cost",
    "decode",
    "decode_costs",
    "decode_volumes",
    "exchange_from",
    "helix_volume",
    "kv_reread",
    "layer_volumes",
    "make_trace",
    "makespan",
    "measured_pipeline",
    "most_requests",
    "overlap",
    "percentile",
    "pipeline",
    "prefill_costs",
    "read_trace",
    "repeated_makespan",
    "ring_costs",
    "ring_method",
    "ring_seconds",
    "ring_volumes",
    "saturated",
    "saturating_chunk",
    "shift",
    "simulate",
    "step_costs",
    "step_seconds",
    "strided_volumes",
    "tbt_budget",
    "tile_fit",
    "undecided",
    "usp_costs",
    "usp_volumes",
    "write_trace",
]
