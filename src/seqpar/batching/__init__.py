"""What runs together: requests, the steps that policies compose of them, and the loop that runs the steps.

`compose` is a pure function of integers, and usable alone; `TemporalFusion` drives it over any model that is a function
from a batch to logits, such as `seqpar.hf.Stepper`.
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
from seqpar.batching.requests import Progress, Request, Sampling
from seqpar.batching.sampling import sample, uniform
from seqpar.batching.sharing import share

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
    "Policy",
    "Preemption",
    "PrefillFirst",
    "Progress",
    "Request",
    "RequestLevel",
    "Room",
    "Sampling",
    "StallFree",
    "Step",
    "StepFunction",
    "TemporalFusion",
    "compose",
    "sample",
    "share",
    "uniform",
]
