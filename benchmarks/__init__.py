"""Measured comparisons: `python -m benchmarks.NAME [--json FILE]`; what was last kept is in baselines/NAME.json."""
