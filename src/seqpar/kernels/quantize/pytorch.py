"""The wire formats by PyTorch's operators, whose definition is already vectorised."""

from seqpar.kernels.quantize.reference import decode, encode

__all__ = ["decode", "encode"]
