"""Sparse attention by what it sends: a policy says which keys travel, and what error that makes."""

from seqpar.layers.csa.core import CSAAttention, CSAResult, Policy
from seqpar.layers.csa.strided import Strided

__all__ = ["CSAAttention", "CSAResult", "Policy", "Strided"]
