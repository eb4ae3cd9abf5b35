"""Errors that end a run with one sentence, and which of them a restart can mend."""

from alignment import AlignmentError, TokenizerError
from teachers.protocol.errors import TeacherError, Unavailable
from trainer.errors import PeerError, UserError

ONE_SENTENCE = (UserError, TeacherError, AlignmentError, TokenizerError)
_TRANSIENT = (PeerError, Unavailable)


def is_permanent(error: BaseException) -> bool:
    """Return whether a restart would fail again: only a user can change the settings, paths or data at fault."""
    return isinstance(error, ONE_SENTENCE) and not isinstance(error, _TRANSIENT)
