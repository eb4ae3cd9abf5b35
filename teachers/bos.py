"""The BOS token of a model, and whether the model expects it in front of every text: one rule for engines and dialects.

1. The id: the tokenizer's own BOS token; the model configuration's id if the tokenizer has none.
2. Without a BOS token nothing is expected.
3. BOS is expected if transformers puts it in front of an encoded text. Beside a tokenizer.json, transformers ignores
   `add_bos_token` of tokenizer_config.json.
4. It is not expected if transformers does not, and `add_bos_token` is false.
5. Otherwise BOS is expected if the model predicts a plain sentence better with it: see prefers_bos.

alignment/tokenizers/folder.py writes the result of rules 3 and 4 as `add_bos_token` into the served
tokenizer_config.json, which has no such key if rule 5 decides.
"""

import json
from collections.abc import Sequence

from teachers.protocol.rows import Rows

PREFERS_BELOW = 0.9  # of the loss without BOS. Gemma's loss with BOS is half of it, SmolLM2's is not lower


def bos_id_of(tokenizer_json: bytes, tokenizer_config: bytes, model_bos_id: int | None) -> int | None:
    """Return the id of the tokenizer's own BOS token; `model_bos_id` if the tokenizer has none.

    The two may differ: the model configuration of DeepSeek-R1-Distill-Qwen contains its EOS id instead.
    """
    token = json.loads(tokenizer_config).get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return model_bos_id
    added = json.loads(tokenizer_json).get("added_tokens", [])
    return next((token["id"] for token in added if token["content"] == content), model_bos_id)


def declared_bos(bos_id: int | None, tokenizer_config: bytes) -> bool | None:
    """Return what the served tokenizer_config.json states (rules 2 to 4); None if it states nothing."""
    add_bos_token = json.loads(tokenizer_config).get("add_bos_token")
    if bos_id is None:
        return False
    return add_bos_token if isinstance(add_bos_token, bool) else None


def bos_probes(bos_id: int, ids: Sequence[int]) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """Return (sequence, start) with and without BOS for rule 5. Both score the same tokens but the first one."""
    return ([bos_id, *ids], 2), (list(ids), 1)


def prefers_bos(with_bos: Rows, without_bos: Rows) -> bool:
    """Return whether the mean loss (nats per token) of the probe is at least a tenth lower with BOS (rule 5)."""
    return bool(-with_bos.actual.mean() < PREFERS_BELOW * -without_bos.actual.mean())
