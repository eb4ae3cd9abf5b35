"""Evaluation of the student: held-out text, agreement with the teachers, lm-eval tasks; export with a model card."""
