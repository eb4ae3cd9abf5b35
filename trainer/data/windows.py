"""Windows: pieces of a text that every model can see whole, cut where tokens of the student end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alignment import Tokens, Vocabulary

STRETCH_BYTES = 1 << 17


def stretches(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """A text of any length in stretches of at most STRETCH_BYTES, so that it is never in memory whole.

    `read` returns as many bytes as it is asked for, fewer only at the end. A stretch ends with a line; where there is
    none, before a space; where there is neither, with a character.
    """
    rest = b""
    while data := rest + read(STRETCH_BYTES - len(rest)):
        end = len(data) if len(data) < STRETCH_BYTES else _safe_end(data)
        yield data[:end]
        rest = data[end:]


def _safe_end(data: bytes) -> int:
    half = len(data) // 2
    if line := data.rfind(b"\n", half) + 1:
        return line
    space = data.rfind(b" ", half)
    return space if space >= half else max(len(data) - _started(data), half)


def _started(data: bytes) -> int:
    """Bytes at the end that may belong to a character which goes on behind it."""
    for back in range(1, 5):
        if data[-back] & 0xC0 != 0x80:
            return back
    return 0  # no UTF-8, as decoding it will say


def cut_windows(text: str, vocabulary: Vocabulary, window_tokens: int) -> Iterator[str]:
    """Pieces of the text, in order and without gaps, each at most `window_tokens` tokens long when read alone."""
    data, begin = text.encode(), 0
    for end, _ in cut([text], vocabulary, window_tokens)[0]:
        yield data[begin:end].decode()
        begin = end


def cut(texts: Sequence[str], vocabulary: Vocabulary, window_tokens: int) -> list[list[tuple[int, int]]]:
    """The windows of each text, as `cut_windows` has them: the byte where each ends, and its tokens when read alone.

    All texts are tokenized together, on all cores. A text of no characters has no window.
    """
    tokens = vocabulary.encode_batch(texts)
    cuttings = [_Cutting.of(t, window_tokens) for t in tokens]
    while unfinished := [c for c in cuttings if not c.is_done]:
        plans = [c.plan() for c in unfinished]
        counts = iter(vocabulary.num_tokens([text for plan in plans for text in plan.texts]))
        for cutting, plan in zip(unfinished, plans, strict=True):
            cutting.take(plan, [next(counts) for _ in plan.texts], window_tokens)
    return [c.windows for c in cuttings]


@dataclass(frozen=True)
class _Plan:
    """Cuts that would do if a window had as many tokens alone as it has in the text; `forced` ones have no choice."""

    cuts: list[int]
    texts: list[str]
    forced: list[bool]


@dataclass(eq=False)
class _Cutting:
    """One text on its way. A cut is a token that ends a character; the last one may be the end of the text.

    A window that is longer alone than in the text is planned again, and those after it are planned shorter by as much:
    a tokenizer that does so once (it puts a space in front) does so again.
    """

    data: bytes
    tokens_C: NDArray[np.int64]  # of each possible cut: the token, and the byte where it ends
    ends_C: NDArray[np.int64]
    size: int
    windows: list[tuple[int, int]] = field(default_factory=list)
    begin: int = 0
    next_cut: int = 0

    @classmethod
    def of(cls, tokens: Tokens, window_tokens: int) -> "_Cutting":
        data, ends = np.frombuffer(tokens.text + b"\0", dtype=np.uint8), tokens.ends
        forward = (ends > 0) & (ends >= np.maximum.accumulate(ends)) & (data[ends.clip(0)] & 0xC0 != 0x80)
        whole = np.flatnonzero(forward)
        whole = whole[np.append(np.diff(ends[whole]) > 0, True)[: len(whole)]]  # tokens without bytes end with others
        ends = ends[whole]
        if tokens.num_bytes and (not len(ends) or ends[-1] < tokens.num_bytes):  # the end has no token of its own
            whole, ends = np.append(whole, 1 << 62), np.append(ends, tokens.num_bytes)
        return cls(tokens.text, whole, ends, window_tokens)

    @property
    def is_done(self) -> bool:
        return self.begin == len(self.data)

    def plan(self) -> _Plan:
        plan, begin, at = _Plan([], [], []), self.begin, self.next_cut
        while begin < len(self.data):
            first = int(self.tokens_C[at - 1]) + 1 if at else 0
            fits = int(np.searchsorted(self.tokens_C, first + self.size - 1, side="right")) - 1
            plan.cuts.append(max(fits, at))
            plan.forced.append(fits <= at)
            end = int(self.ends_C[plan.cuts[-1]])
            plan.texts.append(self.data[begin:end].decode())
            begin, at = end, plan.cuts[-1] + 1
        return plan

    def take(self, plan: _Plan, counts: Sequence[int], window_tokens: int) -> None:
        """Keep the planned windows up to the first that is too long."""
        for at, count, forced in zip(plan.cuts, counts, plan.forced, strict=True):
            if count > window_tokens and not forced:
                self.size = max(self.size - (count - window_tokens), 1)
                return
            self.begin = int(self.ends_C[at])
            self.next_cut = at + 1
            self.windows.append((self.begin, count))
