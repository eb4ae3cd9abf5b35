"""Signals: how the scores of one teacher enter the student's loss. The registry imports no component."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.signals.base import TeacherSignal

SIGNALS = {
    "byte_chain": "trainer.signals.byte_chain:ByteChainSignal",
    "em": "trainer.signals.fusellm:ExactMatchSignal",
    "min_ed": "trainer.signals.fusellm:MinEditDistanceSignal",
    "alm": "trainer.signals.alm:AlmSignal",
    "uld": "trainer.signals.uld:UldSignal",
}


def signal_class(name: str) -> "type[TeacherSignal]":
    """Import and return the class of a signal."""
    loaded: type[TeacherSignal] = resolve_name(SIGNALS[name])
    return loaded
