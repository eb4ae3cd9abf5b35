"""Report of a run from its metrics file: history, summary, charts and one HTML page."""
