"""The longest token that a byte string begins with, found in compiled loops.

A tokenizer call takes microseconds; following bytes through a tree of all tokens takes some ten nanoseconds a byte.
BPE does not always begin with the longest token, so chain.py uses this only for branches too improbable to matter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from alignment.compiled import compiled

NOTHING = -1
ROOT = 0


class Flat(NamedTuple):
    """Byte strings one after another: string i is data[offsets[i]:offsets[i + 1]]."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]


class Trie(NamedTuple):
    """A tree of tokens in an open hash table: from a node by a byte to a node.

    keys   [H] node · 256 + byte, NOTHING where free;  nodes  [H] where it leads;  H is a power of two
    token  [nodes] the token that ends there, NOTHING if none does
    """

    keys: NDArray[np.int64]
    nodes: NDArray[np.int32]
    token: NDArray[np.int32]


def flatten(pieces: Sequence[bytes | None]) -> Flat:
    """Strings that are None are empty."""
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece or b"") for piece in pieces], out=offsets[1:])
    return Flat(np.frombuffer(b"".join(piece or b"" for piece in pieces), dtype=np.uint8), offsets)


def build_trie(pieces: Sequence[bytes | None]) -> Trie:
    """Of all strings that are not empty; of equal ones the first counts."""
    flat = flatten(pieces)
    size = 1 << int(2 * len(flat.data) + 2).bit_length()
    keys, nodes = np.full(size, NOTHING, dtype=np.int64), np.zeros(size, dtype=np.int32)
    token = np.full(len(flat.data) + 1, NOTHING, dtype=np.int32)
    used = _insert(flat.data, flat.offsets, keys, nodes, token)
    return Trie(keys, nodes, token[:used].copy())


@compiled
def _slot(keys: Any, node: int, byte: int) -> Any:
    """Where the edge stands, or would."""
    key = np.int64(node) * 256 + byte
    mask = np.int64(len(keys) - 1)
    at = np.int64((uint64(key) * uint64(0x9E3779B97F4A7C15)) >> uint64(20)) & mask
    while keys[at] != NOTHING and keys[at] != key:
        at = (at + 1) & mask
    return at


@compiled
def _insert(data: Any, offsets: Any, keys: Any, nodes: Any, token: Any) -> int:
    used = 1
    for i in range(len(offsets) - 1):
        node = ROOT
        for j in range(offsets[i], offsets[i + 1]):
            at = _slot(keys, node, np.int64(data[j]))
            if keys[at] == NOTHING:
                keys[at], nodes[at] = np.int64(node) * 256 + np.int64(data[j]), used
                used += 1
            node = nodes[at]
        if node != ROOT and token[node] == NOTHING:
            token[node] = i
    return used


@compiled
def longest(
    keys: Any, nodes: Any, token: Any, head: Any, begin: int, end: int, rest: Any, start: int, stop: int
) -> Any:
    """The longest token that head[begin:end] + rest[start:stop] begins with, and its length; NOTHING and 0 if none.

    Bare arrays and numbers: in a loop over candidates, slices and tuples would be counted as references each time.
    """
    node, best, length = ROOT, NOTHING, 0
    for i in range(end - begin + stop - start):
        byte = np.int64(head[begin + i]) if begin + i < end else np.int64(rest[start + i - (end - begin)])
        at = _slot(keys, node, byte)
        if keys[at] == NOTHING:
            break
        node = nodes[at]
        if token[node] != NOTHING:
            best, length = token[node], i + 1
    return best, length
