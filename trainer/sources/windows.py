"""Windows: consecutive parts of a text, cut between tokens of the student, each short enough for every model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens, Vocabulary

CHUNK_BYTES = 1 << 17
NO_TOKEN = 1 << 62  # greater than every token index


def split_chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Split a stream of UTF-8 into chunks of at most CHUNK_BYTES, so that it is never in memory as a whole.

    A chunk ends after the last line break of its second half, else before the last space, else after a character.

    read  returns the requested number of bytes, or fewer at the end of the stream only
    """
    rest = b""
    while data := rest + read(CHUNK_BYTES - len(rest)):
        end = len(data) if len(data) < CHUNK_BYTES else _chunk_end(data)
        yield data[:end]
        rest = data[end:]


def _chunk_end(data: bytes) -> int:
    half = len(data) // 2
    if line := data.rfind(b"\n", half) + 1:
        return line
    space = data.rfind(b" ", half)
    return space if space >= half else max(len(data) - _incomplete_bytes(data), half)


def _incomplete_bytes(data: bytes) -> int:
    """Return the number of bytes at the end that may be the beginning of a longer character."""
    for back in range(1, 5):
        if data[-back] & 0xC0 != 0x80:
            return back
    return 0  # not UTF-8: the caller's decoding reports the error


def cut_windows(text: str, vocabulary: Vocabulary, window_tokens: int) -> Iterator[str]:
    """Cut a text into consecutive windows, each of at most `window_tokens` tokens when it is tokenized alone.

    A single character with more tokens than that forms a window.
    """
    data, begin = text.encode(), 0
    for end, _ in cut_batch([text], vocabulary, window_tokens)[0]:
        yield data[begin:end].decode()
        begin = end


def cut_batch(texts: Sequence[str], vocabulary: Vocabulary, window_tokens: int) -> list[list[tuple[int, int]]]:
    """Cut several texts as `cut_windows` does, and tokenize them together on all cores.

    Return, for each text, the windows as (byte offset of the end, number of tokens when tokenized alone). An empty
    text has no windows.
    """
    tokens = vocabulary.encode_batch(texts)
    cutters = [_TextCutter.from_tokens(t, window_tokens) for t in tokens]
    # Each round plans the rest of every unfinished text and verifies the plans by tokenizing the planned windows.
    # A round accepts at least the first planned window or lowers `size`, and a plan of size 1 is always accepted.
    while unfinished := [c for c in cutters if not c.is_done]:
        plans = [c.plan() for c in unfinished]
        counts = iter(vocabulary.num_tokens([text for plan in plans for text in plan.texts]))
        for cutter, plan in zip(unfinished, plans, strict=True):
            cutter.accept(plan, [next(counts) for _ in plan.texts], window_tokens)
    return [c.windows for c in cutters]


@dataclass(frozen=True)
class _Plan:
    """Planned windows of the rest of a text. The plan assumes that a window has the same tokens alone as in the text.

    cuts    index of the cut that ends each window
    texts   text of each window
    forced  whether no shorter window is possible
    """

    cuts: list[int]
    texts: list[str]
    forced: list[bool]


@dataclass(eq=False)
class _TextCutter:
    """The state of cutting one text. A possible cut is a token that ends with a whole character.

    A window can have more tokens alone than in the text. It is then planned again, shorter, and so are all windows
    after it: a tokenizer that adds tokens once (a space at the beginning) does so for every window.

    data      the text
    tokens_C  token index of each possible cut; NO_TOKEN for the end of the text without a token
    ends_C    byte offset of each possible cut
    size      planned number of tokens per window
    windows   accepted windows: (byte offset of the end, number of tokens)
    begin     byte offset of the end of the accepted windows
    next_cut  index of the first cut after `begin`
    """

    data: bytes
    tokens_C: NDArray[np.int64]
    ends_C: NDArray[np.int64]
    size: int
    windows: list[tuple[int, int]] = field(default_factory=list)
    begin: int = 0
    next_cut: int = 0

    @classmethod
    def from_tokens(cls, tokens: Tokens, window_tokens: int) -> "_TextCutter":
        data, ends = np.frombuffer(tokens.text + b"\0", dtype=np.uint8), tokens.ends
        # A token is a cut if it ends no earlier than all tokens before it, and if the next byte begins a character.
        is_cut = (ends > 0) & (ends >= np.maximum.accumulate(ends)) & (data[ends.clip(0)] & 0xC0 != 0x80)
        cuts = np.flatnonzero(is_cut)
        # Of several tokens with the same end (tokens without bytes), only the last is a cut.
        cuts = cuts[np.append(np.diff(ends[cuts]) > 0, True)[: len(cuts)]]
        ends = ends[cuts]
        if tokens.num_bytes and (not len(ends) or ends[-1] < tokens.num_bytes):  # no token ends the last characters
            cuts, ends = np.append(cuts, NO_TOKEN), np.append(ends, tokens.num_bytes)
        return cls(tokens.text, cuts, ends, window_tokens)

    @property
    def is_done(self) -> bool:
        return self.begin == len(self.data)

    def plan(self) -> _Plan:
        """Plan the windows of the rest of the text, each of at most `size` tokens of the tokenized text."""
        plan, begin, cut = _Plan([], [], []), self.begin, self.next_cut
        while begin < len(self.data):
            first_token = int(self.tokens_C[cut - 1]) + 1 if cut else 0
            last_fit = int(np.searchsorted(self.tokens_C, first_token + self.size - 1, side="right")) - 1
            plan.cuts.append(max(last_fit, cut))
            plan.forced.append(last_fit <= cut)
            end = int(self.ends_C[plan.cuts[-1]])
            plan.texts.append(self.data[begin:end].decode())
            begin, cut = end, plan.cuts[-1] + 1
        return plan

    def accept(self, plan: _Plan, counts: Sequence[int], window_tokens: int) -> None:
        """Accept the planned windows before the first one that has too many tokens, and reduce `size` by the excess."""
        for cut, count, forced in zip(plan.cuts, counts, plan.forced, strict=True):
            if count > window_tokens and not forced:
                self.size = max(self.size - (count - window_tokens), 1)
                return
            self.begin = int(self.ends_C[cut])
            self.next_cut = cut + 1
            self.windows.append((self.begin, count))
