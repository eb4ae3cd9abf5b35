"""The trainer's side: any number of teachers, asked over HTTP or by handle; without torch, vllm or ray."""
