"""A teacher's side: one engine behind limits, as a process of its own, inside vLLM, or on Ray Serve."""
