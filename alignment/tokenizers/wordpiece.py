"""WordPiece: "##ing" continues a word; a token without the prefix begins a word, after a space.

WordPiece tokens do not contain spaces. The bytes of a token that begins a word include the space before the word.
"""

from alignment.tokenizers.kinds import Spec
from alignment.tokenizers.sentencepiece import SPACE_MARK


class WordPiece:
    """Tokens of words and of continuations of words, as in BERT."""

    name = "wordpiece"
    space_mark = SPACE_MARK  # no token contains a mark; the strings of other kinds are compared with this one

    def matches(self, spec: Spec) -> bool:
        """Return whether the model is of type WordPiece."""
        return bool(spec["model"].get("type") == "WordPiece")

    def token_bytes(self, token: str, model: Spec) -> bytes:
        """Return the bytes of a continuation without its prefix; put a space before a token that begins a word."""
        prefix = model.get("continuing_subword_prefix") or "##"
        if token.startswith(prefix) and token != prefix:
            return bytes(token.removeprefix(prefix).encode())
        begins_word = token[:1].isalnum() and not _is_ideograph(token[0])
        return (f" {token}" if begins_word else token).encode()

    def added_token_bytes(self, content: str, model: Spec) -> bytes:
        """Return the same bytes as for a token of the vocabulary."""
        return self.token_bytes(content, model)

    def as_continuation(self, spec: Spec) -> Spec:
        """Return the tokenizer unchanged: WordPiece adds no space in front of a text."""
        return spec


def _is_ideograph(char: str) -> bool:
    """Return whether a character is a CJK ideograph, which BERT's tokenizers separate without a space."""
    return "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" or "\U00020000" <= char <= "\U0002fa1f"
