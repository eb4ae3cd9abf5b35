"""What does this model think of these tokens?

`protocol`, `rows` and `errors` are the wire; `asking` is the trainer's side of it and imports without torch, vllm or
ray; `engine` and `engines` run models, `serving` answers with them.
"""
