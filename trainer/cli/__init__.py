"""The command line: one file per command, and the functions that only commands use."""
