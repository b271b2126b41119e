"""Keep the memory that a forward pass frees in the process, for the next pass.

glibc returns large blocks to the system as soon as they are freed. Each tensor of a pass then takes new pages, which
the kernel clears one by one: on a CPU that costs a tenth to a quarter of the pass.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> None:
    """Reuse freed blocks of up to a gigabyte in all threads; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_ARENA_MAX, 1)  # the engine's thread and those that load the model share freed blocks
    mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25)  # older versions take no more than this
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
