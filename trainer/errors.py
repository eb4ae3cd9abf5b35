"""Errors that the user can fix. Each message is one sentence that states what to change.

UserError
├── ConfigError         the run file or the environment
├── DataError           a text that cannot be read, or no text to train on
├── MetricsError        a metrics file that cannot be written or read
├── TrackingError       a tracker that is not installed or cannot be opened
├── CheckpointError     a checkpoint that cannot be written or read, or that belongs to another run
│   └── RunInUse        another process holds the lock on the folder of the run
├── PeerError           another process of the run has ended or does not respond; a restart can mend it
├── NonFiniteLoss       a loss or gradient norm of NaN or infinity, in a step before the optimizer, or on held-out text
├── ChatError           a chat that cannot be rendered (trainer/chats/jinja_template.py)
└── BundleError         a model of the demo that cannot be prepared (trainer/cli/bundled_models.py)
"""


class UserError(Exception):
    """Base class of the trainer's errors. teachers.protocol.errors and alignment have their own base classes."""


class ConfigError(UserError):
    """The run file, or the environment that it is used in, is invalid."""


class DataError(UserError):
    """A text cannot be read, or there is nothing to train on."""


class MetricsError(UserError):
    """A metrics file cannot be written or read."""


class TrackingError(UserError):
    """A tracker is not installed or cannot be opened."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or read, or belongs to another run."""


class RunInUse(CheckpointError):
    """Another process holds the lock on the folder of the run."""


class NonFiniteLoss(UserError):
    """A loss or a gradient norm is NaN or infinite."""


class PeerError(UserError):
    """Another process of the run has ended, cannot be reached, or does not respond."""
