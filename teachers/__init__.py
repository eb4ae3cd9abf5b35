"""What does this model think of these tokens?

`protocol`, `rows`, `errors`, `client`, `stock` and `pool` are the asking side and import without torch, vllm or ray.
`engine`, `engines/`, `app` and `serving` are the answering side.
"""
