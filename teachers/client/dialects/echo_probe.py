"""Find out how an OpenAI-compatible endpoint formats its responses, from its response to PROBE_TEXT.

These are pure functions; openai_echo.py sends the requests.
"""

import re
from collections.abc import Mapping

from teachers.client.dialects.echo_completions import EchoFormat, EchoReader, Logprobs
from teachers.client.dialects.token_strings import Token, TokenStrings
from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.protocol.errors import TeacherError

CONTEXT_ERROR = re.compile(r"context (?:length|window|size)\D{0,20}(\d{1,9})")


def context_in(message: str) -> int | None:
    """Return the context length in tokens that an error message states; None if it states none."""
    found = CONTEXT_ERROR.search(message)
    return int(found[1]) if found else None


def text_of(ids: list[int], strings: TokenStrings, folder: TokenizerFolder) -> str | None:
    """Return a text whose tokens are `ids`; None if there is none."""
    tokens = [strings.tokens[i] for i in ids if i in strings.tokens]
    data = b"".join(token.piece.encode() if token.data is None else token.data for token in tokens)
    text = data.decode(errors="replace")
    return next((each for each in (text, text.removeprefix(" ")) if folder.encode(each) == ids), None)


ProbeText = tuple[list[int], int | None, Mapping[int, Token]]


def find_reader(lists: Logprobs, num_prompt_tokens: int | None, takes_ids: bool, text: ProbeText) -> EchoReader:
    """Build the reader of a server from its response to PROBE_TEXT. Raises TeacherError.

    text  ids of PROBE_TEXT, id of BOS, and all tokens of the tokenizer
    """
    ids, bos, tokens = text
    if num_prompt_tokens is None or num_prompt_tokens - len(ids) not in (0, 1):
        raise TeacherError(
            f"expected usage.prompt_tokens of {len(ids)} for the probe text, or one more for BOS, received "
            f"{num_prompt_tokens}: the server's tokenizer differs from tokenizer.json, or it does not count tokens"
        )
    adds_bos = num_prompt_tokens > len(ids)
    if adds_bos and bos is None:
        raise TeacherError("the server puts a token in front of the prompt, but the tokenizer has no BOS")
    first = int(adds_bos and lists.tokens[:1] == [tokens[bos].piece]) if bos is not None else 0  # BOS is listed
    strings = TokenStrings.observed(tokens, ids, lists.tokens[first : first + len(ids)])
    is_shifted = _num_predicted(lists, 1) > _num_predicted(lists, 0)
    return EchoReader(EchoFormat(takes_ids, adds_bos, is_shifted), strings, bos)


def _num_predicted(lists: Logprobs, shift: int) -> int:
    """Count the tokens that are among the first K candidates of the entry `shift` tokens before them."""
    tokens, entries = lists.tokens, lists.top_logprobs or []
    top_k = min((len(entry) for entry in entries if entry), default=0)
    pairs = zip(tokens[shift:], entries, strict=False)
    return sum(token in list(entry)[:top_k] for token, entry in pairs if entry)
