"""Caches on disk: their folder, and a numba decorator that verifies a digest before it loads machine code.

Alignment, fusion and the wire protocol use it. Importing the package does not import numba.
"""
