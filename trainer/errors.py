"""What a user can mend: each message is one sentence that says what to change."""


class UserError(Exception):
    """Base of the trainer's own errors; teachers.errors and alignment have theirs."""


class ConfigError(UserError):
    """A run file that does not say what it should."""


class DataError(UserError):
    """A text that cannot be read or holds nothing to train on."""


class MetricsError(UserError):
    """A metrics file that cannot be written."""


class TrackingError(UserError):
    """A tracker that is not installed or cannot be opened."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class NonFiniteLoss(UserError):
    """A loss that is not a number: found before the optimizer saw it, or on held-out text."""
