"""Attention of few queries to many keys: the keys of a request are split over the processors, and partials merged.

`kernels.attention` is the entry; here is the kernel that it gives its decodes to, and into how many parts.
"""

from seqpar.kernels.decode.plan import MAX_QUERIES, SPLIT_KEYS, split_count

__all__ = ["MAX_QUERIES", "SPLIT_KEYS", "split_count"]
