"""What came of a run: measured on text that is never trained on, and exported."""
