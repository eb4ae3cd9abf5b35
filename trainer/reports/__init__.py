"""What is written down of a run while it goes on, and read again: metrics, curves, pages, trackers."""
