"""Convert the next-token distributions of a teacher to distributions over the tokens of a student.

Two tokenizations of one text share its bytes. `tokenizers` converts token ids to bytes, `placement` and `offsets` find
the byte offsets of tokens and the boundaries that both tokenizations share, `byte_chain` moves probability across the
text between two shared boundaries, `target` stores the result, and `report` measures how much of the teacher's
knowledge the result contains. Requires numpy, numba, rapidfuzz and tokenizers; no model and no network.
"""

from alignment.byte_chain import align
from alignment.offsets import AlignmentError, Tokens
from alignment.target import Target
from alignment.tokenizers.kinds import TokenizerError
from alignment.tokenizers.vocabulary import Vocabulary
from alignment.translation import Translation, translate

__all__ = ["AlignmentError", "Target", "TokenizerError", "Tokens", "Translation", "Vocabulary", "align", "translate"]
