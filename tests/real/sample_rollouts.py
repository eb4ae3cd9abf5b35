"""Generate tests/golden/rollouts.json: prompts and token ids sampled from SmolLM2.

`python -m tests.real.sample_rollouts` samples them again, in two minutes on one core. Run it only if other rollouts
are intended: the test of tests/real/test_rollouts.py then needs new numbers.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment import Vocabulary
from trainer.paths import resolve_data_file, resolve_model_dir

ROLLOUTS = Path(__file__).parents[1] / "golden" / "rollouts.json"
NUM_ROLLOUTS, BATCH_SIZE, MAX_NEW_TOKENS, SEED = 200, 20, 40, 0
MIN_PARAGRAPH_CHARS, MIN_PROMPT_WORDS, MAX_PROMPT_WORDS = 120, 4, 16


def prompts() -> list[str]:
    """Return the first words of paragraphs of CPython's documentation."""
    rng, paragraphs = random.Random(SEED), []
    for line in resolve_data_file("pydoc-topics.jsonl").read_text(encoding="utf-8").splitlines():
        paragraphs += [p.strip() for p in json.loads(line)["text"].split("\n\n") if len(p) >= MIN_PARAGRAPH_CHARS]
    chosen = rng.sample(paragraphs, NUM_ROLLOUTS)
    return [" ".join(p.split(" ")[: rng.randint(MIN_PROMPT_WORDS, MAX_PROMPT_WORDS)]).rstrip() for p in chosen]


def sampled(model_dir: Path, prompt_ids: list[list[int]], end: int) -> Iterator[list[int]]:
    """Sample one continuation of each prompt at temperature 1, up to and including EOS."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for begin in range(0, len(prompt_ids), BATCH_SIZE):
        batch = prompt_ids[begin : begin + BATCH_SIZE]
        longest = max(map(len, batch))
        padded = torch.tensor([[end] * (longest - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": end}
        out = model.generate(padded, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, **settings)
        for ids in out[:, longest:].tolist():
            yield ids[: ids.index(end) + 1] if end in ids else ids


def write_rollouts() -> None:
    """Write one rollout per line: prompt, prompt_ids, sampled_ids."""
    folder = resolve_model_dir("smollm2-135m-instruct")
    vocabulary, texts = Vocabulary.load(folder), prompts()
    prompt_ids = [tokens.ids.tolist() for tokens in vocabulary.encode_batch(texts)]
    rollouts = zip(texts, prompt_ids, sampled(folder, prompt_ids, vocabulary.roles["eos"]), strict=True)
    lines = [json.dumps({"prompt": text, "prompt_ids": ids, "sampled_ids": new}) for text, ids, new in rollouts]
    ROLLOUTS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    write_rollouts()
    sys.stdout.write(f"wrote {ROLLOUTS}\n")
