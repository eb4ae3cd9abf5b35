"""Numba decorator with a disk cache that verifies a digest before it loads machine code.

Alignment, fusion and the wire protocol use it. It depends on numba only.
"""

from kernel_cache.compiled import compiled as compiled
