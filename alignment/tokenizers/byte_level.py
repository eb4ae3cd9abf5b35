"""Byte-level BPE: every character of a token stands for one byte.

Used by GPT-2, Llama 3, Qwen, DeepSeek, Tekken and others that were converted from tiktoken.
"""

from alignment.tokenizers.kinds import Spec, text_components, with_component_fields


class ByteLevel:
    """Tokens of printable characters, one for each byte; "Ġ" is the space."""

    name = "byte-level"
    space_mark = "Ġ"

    def matches(self, spec: Spec) -> bool:
        """Return whether a BPE or Unigram tokenizer has a component of type ByteLevel."""
        model = spec["model"]
        if model.get("type") not in ("BPE", "Unigram") or model.get("end_of_word_suffix"):
            return False
        return any(component.get("type") == "ByteLevel" for component in text_components(spec))

    def token_bytes(self, token: str, model: Spec) -> bytes:
        """Return one byte per character; a token with other characters is ordinary UTF-8 text."""
        if all(c in _BYTE_OF_CHARACTER for c in token):
            return bytes(_BYTE_OF_CHARACTER[c] for c in token)
        return token.encode()

    def added_token_bytes(self, content: str, model: Spec) -> bytes:
        """Return the UTF-8 bytes: added tokens are stored as plain text."""
        return content.encode()

    def as_continuation(self, spec: Spec) -> Spec:
        """Switch off the leading space."""
        return with_component_fields(spec, {"ByteLevel": {"add_prefix_space": False}, "Prepend": {"prepend": ""}})


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's character for each of the 256 bytes: printable Latin-1 is unchanged, the rest is at U+0100 …."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(moved)}


_BYTE_OF_CHARACTER = _byte_of_character()
