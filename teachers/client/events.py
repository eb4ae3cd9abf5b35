"""Events of a teacher during a run."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TeacherEvent:
    """The loss of a teacher during a run, or its return."""

    kind: Literal["teacher_lost", "teacher_joined"]
    teacher: str
    detail: str
