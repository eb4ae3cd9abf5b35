"""Queries to the teachers: connections, scoring of samples, and prefetching within a memory budget."""
