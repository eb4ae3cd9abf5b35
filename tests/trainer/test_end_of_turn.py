"""Students that are trained on a few chats until they know them stop after their answers, by the exported settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.templates import CHATML, LLAMA2, chat, spec_of
from tests.tiny import tokenizer_config
from tests.trainer.runs import run_config
from trainer.training.loop import train

pytestmark = pytest.mark.slow

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MAX_NEW_TOKENS = 30
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def save_base(folder: Path, *, special: bool) -> int:
    """Save an untrained model whose tokenizer has the end-of-turn tokens; return the id of <|im_end|>."""
    spec = spec_of("byte_level", special=special)
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=max(ids.values()) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=ids["<|bos|>"],
        eos_token_id=ids["<|eos|>"],
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config("byte_level")), encoding="utf-8")
    return int(ids["<|im_end|>"])


@pytest.mark.parametrize(
    ("text", "special", "end"),
    [(CHATML + PROMPT, True, "<|im_end|>"), (LLAMA2, True, "<|eos|>"), (CHATML + PROMPT, False, "<|im_end|>")],
    ids=["a special token", "EOS after a space", "a token that is not special"],
)
def test_a_student_that_has_learnt_sixteen_chats_stops_after_its_answers(
    tmp_path: Path, text: str, special: bool, end: str
) -> None:
    save_base(tmp_path / "base", special=special)
    (tmp_path / "base" / "chat_template.jinja").write_text(text, encoding="utf-8")
    chats = [chat(f"{a} {b}", f"{b} {a}") for a in NUMBERS[:4] for b in NUMBERS[4:]]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in chats]
    (tmp_path / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    train(
        run_config(
            tmp_path / "base",
            tmp_path / "chats.jsonl",
            tmp_path / "out",
            [],
            source={"messages_column": "messages"},
            data={"max_samples": None},
            train={"epochs": 80, "batch_samples": 16},
            optim={"lr": 1e-2},
            eval={"held_out_documents": 0},
        )
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    for messages in chats:
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        answer = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert len(answer) < MAX_NEW_TOKENS, tokenizer.decode(answer)
        assert tokenizer.convert_ids_to_tokens(int(answer[-1])) == end
