"""The student and its step: trunk and head, losses, one update. On one device or over several ranks."""
