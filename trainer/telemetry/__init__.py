"""Telemetry of a run: typed events, the metrics file, its reference page and experiment trackers."""
