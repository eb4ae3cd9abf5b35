"""Tokens that were sampled from a model. The tokenizer may encode the same text with other tokens.

A model may write `can't` as `can · ' · t`, where its tokenizer writes `can · 't`. The tokenizer's own tokens of a text
are its canonical tokens. `complete_length` returns how many sampled ids have a text, `Tokens.continued` appends them to
the tokens of their prompt without tokenizing the text again, and `transfer_target` moves the rows of a target from the
canonical tokens to the sampled tokens.

Both tokenizations write the same bytes. The text between two neighbouring common boundaries is a block, as in
byte-chain alignment. A block of one and the same token keeps its row. In any other block, the rows of the canonical
tokens are distributions of what follows the canonical tokens before them, and only the first row has a position in the
sampled tokens: the start of the block. A row aligned to the sampled tokens themselves would prefer the unusual
tokens, because the text of a block is always one of its branches.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignment.offsets import AlignmentError, Tokens
from alignment.target import Target
from alignment.tokenizers.vocabulary import Vocabulary

NO_ROW = -1


def complete_length(vocabulary: Vocabulary, ids: Sequence[int]) -> int:
    """Return the length of the longest prefix of the ids that decodes to valid UTF-8.

    A text may end inside a character because its length is limited, and a model may sample bytes that are no UTF-8.
    The text is cut before the first such byte, at the end of a token.

    ids  sampled tokens without an end token
    Raises AlignmentError for an id that is not in the vocabulary or has no bytes.
    """
    pieces = _pieces(vocabulary, ids)
    data = b"".join(pieces)
    try:
        data.decode()
        return len(pieces)
    except UnicodeDecodeError as error:
        num_bytes = error.start  # of whole characters
    begins_character = (np.frombuffer(data[:num_bytes], dtype=np.uint8) & 0xC0) != 0x80
    ends = np.cumsum([len(piece) for piece in pieces])
    is_whole = np.append(begins_character, True)[ends[ends <= num_bytes]]
    return int(np.flatnonzero(is_whole).max(initial=-1)) + 1


def transfer_target(target: Target, canonical: Tokens, sampled: Tokens) -> Target:
    """Return the rows of a target over the canonical tokens as a target over the sampled tokens of the same text.

    The first sampled token of a block has the row of the first canonical token of the block. All other sampled tokens
    of a block are invalid. Inputs are not changed; if both tokenizations are equal, the target itself is returned.

    target     one row for each canonical token
    canonical  `Vocabulary.encode` of the text, with EOS if the sampled tokens end with EOS
    Raises AlignmentError if the texts or the numbers of rows and tokens differ.
    """
    if len(target) != len(canonical):
        raise AlignmentError(f"expected {len(canonical)} rows, one per canonical token, received {len(target)}")
    if are_equal(canonical, sampled):
        return target
    rows = _rows_of(canonical, sampled)
    has_row = rows != NO_ROW
    used = np.zeros(len(target), dtype=bool)
    used[rows[has_row]] = True
    lengths = np.diff(target.offsets)
    entries = np.repeat(used, lengths)  # the rows keep their order, so that their entries keep theirs
    new_lengths = np.zeros(len(sampled), dtype=np.int64)
    new_lengths[has_row] = lengths[used]
    tail, valid = np.zeros(len(sampled), dtype=target.tail.dtype), np.zeros(len(sampled), dtype=bool)
    tail[has_row], valid[has_row] = target.tail[used], target.valid[used]
    return Target(
        offsets=np.concatenate([[0], np.cumsum(new_lengths)]),
        ids=target.ids[entries],
        probs=target.probs[entries],
        tail=tail,
        valid=valid,
    )


def num_noncanonical(canonical: Tokens, sampled: Tokens) -> int:
    """Count the sampled tokens for which `transfer_target` has no row.

    The result is 0 if every block contains a single sampled token, even if that token differs from the canonical
    tokens. Use `are_equal` to compare the tokens.
    """
    if are_equal(canonical, sampled):
        return 0
    return int((_rows_of(canonical, sampled) == NO_ROW).sum())


def are_equal(canonical: Tokens, sampled: Tokens) -> bool:
    """Return whether two tokenizations of a text are the same."""
    return (
        canonical.text == sampled.text
        and np.array_equal(canonical.ids, sampled.ids)
        and np.array_equal(canonical.ends, sampled.ends)
    )


def _rows_of(canonical: Tokens, sampled: Tokens) -> NDArray[np.int64]:
    """[T] Return the index of the canonical token whose row each sampled token has, in rising order, or NO_ROW.

    The first tokens of a block are the two tokens that begin at the same byte.
    """
    closed, expected = _is_closed(sampled), _is_closed(canonical)
    if canonical.text != sampled.text or closed != expected:
        raise AlignmentError(
            "expected canonical and sampled tokens of the same text, both with EOS or both without; received "
            f"{canonical.num_bytes} bytes {'with' if expected else 'without'} EOS and "
            f"{sampled.num_bytes} bytes {'with' if closed else 'without'} EOS"
        )
    (canonical_index, canonical_at), (sampled_index, sampled_at) = _begins(canonical), _begins(sampled)
    if canonical.own_space[:1].any() and sampled.own_space[:1].any():
        # Both texts begin with an added space. A token that is only this space and its successor both begin at byte 0.
        canonical_at[0] = sampled_at[0] = -1
    _, in_canonical, in_sampled = np.intersect1d(canonical_at, sampled_at, return_indices=True)
    rows = np.full(len(sampled), NO_ROW, dtype=np.int64)
    rows[sampled_index[in_sampled]] = canonical_index[in_canonical]
    return rows


def _is_closed(tokens: Tokens) -> bool:
    return len(tokens) > 0 and int(tokens.ends[-1]) > tokens.num_bytes


def _begins(tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the tokens whose first byte is known, and these bytes, in rising order."""
    starts = tokens.starts
    index = np.flatnonzero((starts >= 0) & (starts >= np.maximum.accumulate(starts)))
    return index, starts[index]


def _pieces(vocabulary: Vocabulary, ids: Sequence[int]) -> list[bytes]:
    """Return the bytes of each id. Raises AlignmentError for an id without bytes."""
    pieces = []
    for position, i in enumerate(ids):
        if not 0 <= i < len(vocabulary):
            raise AlignmentError(
                f"{vocabulary.name}: expected sampled ids from 0 to {len(vocabulary) - 1}, received {i} at position "
                f"{position}: the model must not sample ids that its tokenizer lacks"
            )
        piece = vocabulary.token_bytes[i]
        if not piece:
            raise AlignmentError(
                f"{vocabulary.name}: expected sampled tokens that write text, received "
                f"{vocabulary.tokens[i]!r} (id {i}) at position {position}"
            )
        pieces.append(piece)
    return pieces
