"""Key-value caches: pages, and who holds them."""

from seqpar.kv.paged import PagedKV

__all__ = ["PagedKV"]
