"""The numba decorator of all packages, with a cache on disk that a damaged file cannot turn into wrong machine code.

Alignment, fusion and the protocol of the teachers use it. Requires numba only.
"""

from kernel_cache.compiled import compiled as compiled
