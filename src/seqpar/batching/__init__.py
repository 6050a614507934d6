"""What runs together: requests, the steps that policies compose of them, and the loop that runs the steps.

`compose` is a pure function of integers, and usable alone; `TemporalFusion` drives it over any model that is a function
from a batch to logits, such as `seqpar.hf.Stepper`, and `PipelineFusion` over one that is cut into stages.
"""

from seqpar.batching.compose import (
    Admission,
    Budget,
    Composer,
    DecodeMaximal,
    Draft,
    Exclusive,
    FullHybrid,
    Policy,
    PrefillFirst,
    RequestLevel,
    Room,
    StallFree,
    Step,
    compose,
)
from seqpar.batching.fusion import Emitted, Finish, Generation, Preemption, StepFunction, TemporalFusion
from seqpar.batching.journal import Journal
from seqpar.batching.microbatches import MicroBatchQueue, Spread
from seqpar.batching.pipeline import PipelineFusion, StageFunction
from seqpar.batching.requests import Progress, Request, Sampling
from seqpar.batching.sampling import sample, uniform
from seqpar.batching.sharing import share
from seqpar.batching.words import Words

__all__ = [
    "Admission",
    "Budget",
    "Composer",
    "DecodeMaximal",
    "Draft",
    "Emitted",
    "Exclusive",
    "Finish",
    "FullHybrid",
    "Generation",
    "Journal",
    "MicroBatchQueue",
    "PipelineFusion",
    "Policy",
    "Preemption",
    "PrefillFirst",
    "Progress",
    "Request",
    "RequestLevel",
    "Room",
    "Sampling",
    "Spread",
    "StageFunction",
    "StallFree",
    "Step",
    "StepFunction",
    "TemporalFusion",
    "Words",
    "compose",
    "sample",
    "share",
    "uniform",
]
