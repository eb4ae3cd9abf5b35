"""SentencePiece, BPE or Unigram: "▁" stands for a space and, with byte fallback, "<0x0A>" for a single byte."""

import re

from alignment.tokenizers.kinds import Spec, text_components, with_component_fields

SPACE_MARK = "▁"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class SentencePiece:
    """Tokens of text in which "▁" is the space."""

    name = "sentencepiece"
    space_mark = SPACE_MARK

    def matches(self, spec: Spec) -> bool:
        """Return whether a BPE or Unigram tokenizer marks spaces with "▁" or falls back to bytes."""
        model = spec["model"]
        if model.get("type") not in ("BPE", "Unigram") or model.get("end_of_word_suffix"):
            return False
        if model["type"] == "Unigram" or model.get("byte_fallback"):
            return True
        return any(
            component.get("type") == "Metaspace"
            or SPACE_MARK in (component.get("content"), component.get("prepend"), component.get("replacement"))
            for component in text_components(spec)
        )

    def token_bytes(self, token: str, model: Spec) -> bytes:
        """Return the byte of a fallback token, else the UTF-8 bytes with spaces for the marks."""
        byte = _FALLBACK_BYTE.fullmatch(token) if model.get("byte_fallback") else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()

    def added_token_bytes(self, content: str, model: Spec) -> bytes:
        """Return the same bytes as for a token of the vocabulary."""
        return self.token_bytes(content, model)

    def as_continuation(self, spec: Spec) -> Spec:
        """Switch off the leading space."""
        return with_component_fields(spec, {"Prepend": {"prepend": ""}, "Metaspace": {"prepend_scheme": "never"}})
