"""Which student positions and tokens does a teacher's row speak of?

Bytes are the common ground: `vocabulary` and `spelling` turn token ids into bytes, `spans` cuts two tokenizations
of one text at their common boundaries, `chain` moves probability across each block, `target` holds the result and
`report` says how much of the teacher arrived. numpy, numba and tokenizers only; no model, no network.
"""

from alignment.chain import align
from alignment.spans import AlignmentError, Tokens
from alignment.spelling import TokenizerError
from alignment.target import Target
from alignment.translation import Translation, translate
from alignment.vocabulary import Vocabulary

__all__ = ["AlignmentError", "Target", "TokenizerError", "Tokens", "Translation", "Vocabulary", "align", "translate"]
