"""Tokens that a model sampled, which can differ from the tokenizer's own tokens of the same text.

A model may write `can't` as `can · ' · t`, where its tokenizer writes `can · 't`. The tokenizer's own tokens of a text
are its canonical tokens. `sampled_tokens` locates sampled ids in their text without tokenizing the text again, and
`transfer_target` moves the rows of a target from the canonical tokens to the sampled tokens.

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
from alignment.placement import locate_tokens
from alignment.target import Target
from alignment.tokenizers.vocabulary import Vocabulary

NO_ROW = -1


def sampled_tokens(vocabulary: Vocabulary, ids: Sequence[int]) -> Tokens:
    """Locate sampled ids in the text that they write, as `Vocabulary.encode` locates its own.

    A leading space is left out of the text if the tokenizer adds one in front of every text.

    ids  tokens of a whole text without BOS, for example of a prompt and its continuation. EOS at the end closes the
         text and has no bytes
    Raises AlignmentError for an id that is not in the vocabulary or has no bytes, and for bytes that are not UTF-8;
    `complete_length` returns how many of the ids have a text.
    """
    written, is_closed = _without_end(vocabulary, ids)
    pieces = _pieces(vocabulary, written)
    data = b"".join(pieces)
    num_complete = _complete_length(data, pieces)
    if num_complete < len(pieces):
        raise AlignmentError(
            f"{vocabulary.name}: expected sampled tokens that end at a whole character, received {len(pieces)} tokens "
            f"of which the first {num_complete} do"
        )
    text = data.removeprefix(b" ") if vocabulary.adds_space else data
    tokens = locate_tokens(text.decode(), np.array(written, dtype=np.int64), pieces, (), frozenset())
    return tokens.with_end_token(vocabulary.roles["eos"]) if is_closed else tokens


def complete_length(vocabulary: Vocabulary, ids: Sequence[int]) -> int:
    """Return the largest number of leading ids whose bytes are UTF-8 text that ends at a whole character.

    A text may end inside a character because its length is limited, and a model may sample bytes that are no UTF-8.
    The text is cut before the first such byte, at the end of a token. EOS counts only if nothing before it is cut.

    Raises AlignmentError for an id that is not in the vocabulary or has no bytes.
    """
    written, _ = _without_end(vocabulary, ids)
    pieces = _pieces(vocabulary, written)
    num_complete = _complete_length(b"".join(pieces), pieces)
    return len(ids) if num_complete == len(pieces) else num_complete


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
    """Return the number of sampled tokens to which `transfer_target` gives no row, valid or not."""
    if are_equal(canonical, sampled):
        return 0
    return int((_rows_of(canonical, sampled) == NO_ROW).sum())


def are_equal(canonical: Tokens, sampled: Tokens) -> bool:
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


def _without_end(vocabulary: Vocabulary, ids: Sequence[int]) -> tuple[Sequence[int], bool]:
    """Return the ids without EOS at the end, and whether there was one."""
    is_closed = len(ids) > 0 and ids[-1] == vocabulary.roles.get("eos")
    return (ids[:-1] if is_closed else ids), is_closed


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
                f"{vocabulary.name}: expected sampled tokens that write text, and EOS only at the end, received "
                f"{vocabulary.tokens[i]!r} (id {i}) at position {position}"
            )
        pieces.append(piece)
    return pieces


def _complete_length(data: bytes, pieces: Sequence[bytes]) -> int:
    """Return the largest number of leading pieces that are UTF-8 text and end at a whole character."""
    try:
        data.decode()
        return len(pieces)
    except UnicodeDecodeError as error:
        num_bytes = error.start  # of whole characters
    begins_character = (np.frombuffer(data[:num_bytes], dtype=np.uint8) & 0xC0) != 0x80
    ends = np.cumsum([len(piece) for piece in pieces])
    is_whole = np.append(begins_character, True)[ends[ends <= num_bytes]]
    return int(np.flatnonzero(is_whole).max(initial=-1)) + 1
