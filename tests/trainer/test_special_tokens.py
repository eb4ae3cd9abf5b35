"""The pattern of the special tokens of a model: it matches what an alternation of all tokens matches."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from trainer.chats.special_tokens import token_pattern

TEXT = st.text("<|>ab.", max_size=30)


@given(tokens=st.lists(st.text("<|>ab.", max_size=6), max_size=12), text=TEXT)
@example(tokens=["a" * n for n in range(400)], text="<" + "a" * 500)
@example(tokens=["<a", "<a>", "<ab>"], text="<a><ab<ab>")
@example(tokens=[""], text="ab")
def test_the_longest_token_at_each_position_is_found_as_in_an_alternation_of_all(tokens: list[str], text: str) -> None:
    longest_first = sorted(set(tokens) - {""}, key=len, reverse=True)
    expected = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    pattern = token_pattern(tokens)
    assert [match.span() for match in pattern.finditer(text)] == [match.span() for match in expected.finditer(text)]
    assert all(pattern.fullmatch(token) for token in longest_first)
