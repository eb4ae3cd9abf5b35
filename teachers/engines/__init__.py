"""Backends: one file per library that can run a model."""
