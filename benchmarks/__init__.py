"""Benchmarks: `python -m benchmarks.NAME [--json FILE]`. baselines/NAME.json contains the results of an earlier run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command `tutelage` does, and before torch is loaded
