"""Stand-in for flash-attn on a machine without a GPU, so that yunchang imports and runs its own communication there.

Only forward passes, by PyTorch's fused CPU attention: the same kernel that the other contenders of the benchmark use.
"""

from .flash_attn_interface import flash_attn_func

__all__ = ["flash_attn_func"]
__version__ = "2.8.0"
