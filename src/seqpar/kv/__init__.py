"""Key-value caches: pages, and who holds them."""

from seqpar.kv.paged import PagedKV
from seqpar.kv.striped import StripedKV

__all__ = ["PagedKV", "StripedKV"]
