"""Key-value caches: pages and who holds them, slots and how they are brought together, requests saved and restored."""

from seqpar.kv import compaction
from seqpar.kv.compaction import CompactionPlan
from seqpar.kv.paged import PagedKV
from seqpar.kv.pages import OutOfPages, PageAllocator, page_keys
from seqpar.kv.saved import SavedKV, load_request, save_request
from seqpar.kv.slots import SlotTable
from seqpar.kv.striped import StripedKV

__all__ = [
    "CompactionPlan",
    "OutOfPages",
    "PageAllocator",
    "PagedKV",
    "SavedKV",
    "SlotTable",
    "StripedKV",
    "compaction",
    "load_request",
    "page_keys",
    "save_request",
]
