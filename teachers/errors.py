"""Everything that can go wrong between the trainer and a teacher.

TeacherError                     names the teacher and what to do
├── Unavailable                  no answer now; the same question may be asked again
│   ├── Overloaded               429 or 503; carries the server's Retry-After
│   ├── EngineDead               the model's process or device is broken for good
│   ├── TeacherLost              no replica is left, and the run goes on without this teacher
│   └── Truncated                the stream ended before the last sequence
├── Rejected                     the teacher refused the question; asking again changes nothing
│   ├── Unauthorized             401: no key, or a wrong one
│   └── NotFound                 404: the server has no such route
└── ProtocolError                the answer is not one
    ├── VersionMismatch          another protocol version
    ├── FingerprintMismatch      other weights or another tokenizer than the card promised
    └── InvalidRows              a value no model can mean: NaN, positive log-probability, id outside the vocabulary
"""


class TeacherError(Exception):
    """Base of all errors of a teacher."""


class Unavailable(TeacherError):
    """No answer now. Retried by the pool."""


class Overloaded(Unavailable):
    """The teacher asks to come back later."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(Unavailable):
    """Nothing but a new process can answer again. Raised by engines; their server ends."""


class TeacherLost(Unavailable):
    """The teacher is left out until a replica answers again. Raised by the pool only."""


class Truncated(Unavailable):
    """The answer broke off; it is never read as a short answer."""


class Rejected(TeacherError):
    """The question is at fault."""


class Unauthorized(Rejected):
    """The bearer key is missing or wrong."""


class NotFound(Rejected):
    """The server has no such route: it is no teacher, or speaks another dialect."""


class ProtocolError(TeacherError):
    """The answer cannot be trusted."""


class VersionMismatch(ProtocolError):
    """Teacher and trainer speak different protocol versions."""


class FingerprintMismatch(ProtocolError):
    """The teacher is not the one it was."""


class InvalidRows(ProtocolError):
    """Rows that no model can have meant."""
