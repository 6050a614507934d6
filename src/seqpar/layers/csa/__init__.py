"""Sparse attention by what it sends: a policy says which keys travel, and what error that makes."""

from seqpar.layers.csa.certified import Certified
from seqpar.layers.csa.core import CSAAttention, CSAResult, Policy
from seqpar.layers.csa.strided import Strided
from seqpar.layers.csa.topmass import TopMass

__all__ = ["CSAAttention", "CSAResult", "Certified", "Policy", "Strided", "TopMass"]
