"""A bound of the error of attention over keys and values that are known to a certified precision."""

from seqpar.kernels.certificate.plan import raises
from seqpar.kernels.certificate.pytorch import ROUNDOFF, Terms, chunks

__all__ = ["ROUNDOFF", "Terms", "chunks", "raises"]
