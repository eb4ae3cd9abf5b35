"""Measured comparisons: `python -m benchmarks.NAME [--json FILE]`; what was last kept is in baselines/NAME.json."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command `tutelage` does, and before torch is loaded
