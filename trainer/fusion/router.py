"""Fusion method `router`."""

import numpy as np

from trainer.errors import DataError
from trainer.fusion.base import FusionMethod
from trainer.fusion.inputs import Bools, Floats
from trainer.records import Sample
from trainer.sources.corpus import Samples


class Router(FusionMethod):
    """The teacher that a column of the data names for each sample."""

    def check_samples(self, samples: Samples) -> None:
        """Raise DataError if a sample names a teacher that does not exist."""
        for teacher, sample in samples.teachers().items() if self.names else ():
            if teacher not in self.names:
                raise DataError(f"sample {sample}: {self._unknown(teacher)}")

    def teacher_weights(self, sample: Sample, scheduled_N: Floats, available_N: Bools) -> Floats:
        """Return weight 1 for the teacher that the sample names and 0 for the others.

        Raises ValueError if the teacher does not exist.
        """
        if sample.teacher not in self.names:
            raise ValueError(self._unknown(sample.teacher))
        return np.array([float(name == sample.teacher) for name in self.names])

    def _unknown(self, teacher: str | None) -> str:
        return f"router: expected one of {', '.join(self.names)}, received {teacher!r}"
