"""Hugging Face models over several ranks: load a checkpoint by slices, or swap layers into a model that exists.

The only part of seqpar that imports `transformers`.
"""

from seqpar.hf.attend import CSA
from seqpar.hf.auto import AutoOverlap
from seqpar.hf.backbone import LMHead, ParallelBackbone
from seqpar.hf.cache import ParallelCache
from seqpar.hf.decode import AutoDecode
from seqpar.hf.loading import load
from seqpar.hf.recording import Recording
from seqpar.hf.shift import AutoShift
from seqpar.hf.stage import Stage, load_stage
from seqpar.hf.stepper import Stepper
from seqpar.hf.swap import LoadReport, MemoryReport, Parallelized, parallelize

__all__ = [
    "CSA",
    "AutoDecode",
    "AutoOverlap",
    "AutoShift",
    "LMHead",
    "LoadReport",
    "MemoryReport",
    "ParallelBackbone",
    "ParallelCache",
    "Parallelized",
    "Recording",
    "Stage",
    "Stepper",
    "load",
    "load_stage",
    "parallelize",
]
