"""Responses of llama-cpp-python 0.3.36 with SmolLM2-135M-Instruct (Q4_1), recorded by record.py."""
