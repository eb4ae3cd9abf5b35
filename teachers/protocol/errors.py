"""Errors of a teacher or a rollout server, as seen by a client.

TeacherError                     names the teacher and what to do
├── Unavailable                  no response now; the same request may be sent again
│   ├── Overloaded               429 or 503; carries the server's Retry-After
│   ├── NotDeployed              404 of a Ray Serve proxy without an application at the path
│   ├── EngineDead               the model's process or device failed for good
│   ├── TeacherLost              no replica is left, and the run continues without this teacher
│   ├── TlsError                 no secure connection: certificate, ca_file, or http:// instead of https://
│   └── Truncated                the stream ended before the last sequence
├── Rejected                     the teacher refused the request; sending it again changes nothing
│   ├── Unauthorized             401: no key, or a wrong one
│   ├── NotFound                 404: the server has no such route
│   └── Conflict                 409: a rollout server has other weights than the request expects
└── ProtocolError                the response is invalid
    ├── VersionMismatch          another protocol version
    ├── RequestMismatch          the response to another request
    ├── FingerprintMismatch      other weights or another tokenizer than the card states
    └── InvalidRows              a value that no model can return: NaN, positive log-probability, unknown id
"""


class TeacherError(Exception):
    """Base class of all errors of a teacher."""


class Unavailable(TeacherError):
    """The teacher does not respond now. The pool retries the request."""


class Overloaded(Unavailable):
    """The teacher refused the request because it is busy; `retry_after_s` is its Retry-After in seconds."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotDeployed(Unavailable):
    """A Ray Serve proxy has no application at the path: it is not deployed yet, or the path is wrong."""


class EngineDead(Unavailable):
    """The engine failed for good and needs a new process. Engines raise it; their server then exits."""


class TlsError(Unavailable):
    """No secure connection: an untrusted certificate, or only one side speaks TLS. The message has the remedy."""


class TeacherLost(Unavailable):
    """The teacher is left out until a replica responds again. Only the pool raises it."""


class Truncated(Unavailable):
    """The response ended early. It is never decoded as a shorter response."""


class Rejected(TeacherError):
    """The request is invalid for this teacher."""


class Unauthorized(Rejected):
    """The bearer key is missing or wrong."""


class NotFound(Rejected):
    """The server has no such route: it is not a teacher, or it uses another dialect."""


class Conflict(Rejected):
    """The rollout server has other weights than the request expects: synchronize it."""


class ProtocolError(TeacherError):
    """The response is invalid."""


class VersionMismatch(ProtocolError):
    """Server and client use different protocol versions."""


class RequestMismatch(ProtocolError):
    """The response belongs to another request: a proxy, a cache or the server has exchanged two responses."""


class FingerprintMismatch(ProtocolError):
    """The server runs another model or tokenizer than its card states."""


class InvalidRows(ProtocolError):
    """The rows contain a value that no model can return."""
