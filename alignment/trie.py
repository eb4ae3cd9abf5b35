"""The longest token at the start of a byte string, by a prefix tree in compiled loops.

A call of the tokenizer takes microseconds; the prefix tree takes about ten nanoseconds per byte. BPE does not always
begin with the longest token, so byte-chain alignment uses the tree only for branches of low probability.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import uint64
from numpy.typing import NDArray

from kernel_cache.compiled import compiled

NOTHING = -1  # no token; a free slot of the hash table
ROOT = 0


class Flat(NamedTuple):
    """Byte strings in one array: string i is data[offsets[i]:offsets[i + 1]]."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]


class Trie(NamedTuple):
    """A prefix tree of tokens. Its edges are in a hash table with open addressing; H, the table's size, is 2^n.

    keys   [H] int64 edge: node · 256 + byte, NOTHING if the slot is free
    nodes  [H] int32 node at the end of the edge
    token  [nodes] int32 token that ends at the node, NOTHING if none does
    """

    keys: NDArray[np.int64]
    nodes: NDArray[np.int32]
    token: NDArray[np.int32]


def flatten(pieces: Sequence[bytes | None]) -> Flat:
    """Store byte strings in one array; None becomes an empty string."""
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece or b"") for piece in pieces], out=offsets[1:])
    return Flat(np.frombuffer(b"".join(piece or b"" for piece in pieces), dtype=np.uint8), offsets)


def build_trie(pieces: Sequence[bytes | None]) -> Trie:
    """Build the tree of all strings that are not empty; of equal strings the first is used."""
    flat = flatten(pieces)
    # There are at most len(data) edges, one per byte: a table of more than twice that size stays less than half full.
    size = 1 << int(2 * len(flat.data) + 2).bit_length()
    keys, nodes = np.full(size, NOTHING, dtype=np.int64), np.zeros(size, dtype=np.int32)
    token = np.full(len(flat.data) + 1, NOTHING, dtype=np.int32)
    num_nodes = _insert(flat.data, flat.offsets, keys, nodes, token)
    return Trie(keys, nodes, token[:num_nodes].copy())


@compiled
def _slot(keys: Any, node: int, byte: int) -> Any:
    """Return the slot of the edge from `node` by `byte`, or the free slot where it would be inserted.

    The hash is multiplicative (Fibonacci hashing); collisions are resolved by linear probing. The loop ends because the
    table is never full.
    """
    key = np.int64(node) * 256 + byte
    mask = np.int64(len(keys) - 1)
    at = np.int64((uint64(key) * uint64(0x9E3779B97F4A7C15)) >> uint64(20)) & mask
    while keys[at] != NOTHING and keys[at] != key:
        at = (at + 1) & mask
    return at


@compiled
def _insert(data: Any, offsets: Any, keys: Any, nodes: Any, token: Any) -> int:
    """Insert every string into the empty tables; return the number of nodes, including the root."""
    num_nodes = 1
    for i in range(len(offsets) - 1):
        node = ROOT
        for j in range(offsets[i], offsets[i + 1]):  # invariant: `node` is the node of data[offsets[i]:j]
            at = _slot(keys, node, np.int64(data[j]))
            if keys[at] == NOTHING:
                keys[at], nodes[at] = np.int64(node) * 256 + np.int64(data[j]), num_nodes
                num_nodes += 1
            node = nodes[at]
        if node != ROOT and token[node] == NOTHING:  # skip empty strings, keep the first of equal strings
            token[node] = i
    return num_nodes


@compiled
def longest_token(
    keys: Any, nodes: Any, token: Any, head: Any, begin: int, end: int, rest: Any, start: int, stop: int
) -> Any:
    """Return the longest token at the start of head[begin:end] + rest[start:stop], and its length in bytes.

    Returns NOTHING and 0 if there is none. The arguments are single arrays and numbers because numba would count
    references to slices and tuples once per candidate.
    """
    node, best, length = ROOT, NOTHING, 0
    for i in range(end - begin + stop - start):  # invariant: `node` is the node of the first i bytes
        byte = np.int64(head[begin + i]) if begin + i < end else np.int64(rest[start + i - (end - begin)])
        at = _slot(keys, node, byte)
        if keys[at] == NOTHING:
            break  # no token begins with these i + 1 bytes
        node = nodes[at]
        if token[node] != NOTHING:
            best, length = token[node], i + 1
    return best, length
