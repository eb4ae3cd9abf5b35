"""Small real components: tokenizers of two kinds, trained on a page of text, and seeded Llamas with two layers."""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from alignment import Vocabulary

Kind = Literal["byte_level", "sentencepiece"]

TEXT = """The harbour office opened at six. Two clerks sorted the letters by ship and by port, and a third wrote
down the hour at which every sack had come ashore. Nothing was thrown away: a torn label went into a drawer, and
the drawer was emptied once a year, in January, when the wind kept the boats in.

By noon the tide had turned. "Fifty-one sacks," said the older clerk, "and one of them is wet." He was not angry;
he had counted sacks for 27 years, in rain, in fog, and once by the light of a burning warehouse. The younger one
laughed and weighed the sack again: 14.5 kilograms, or 32 pounds, as the captain would have it.

They ate bread and cheese on the wall. A gull watched. When the bell rang they went back inside, where it smelled
of tar and paper, and opened the next sack. It held a clock, a bundle of seed catalogues, eleven letters to the same
address, and a photograph of a house that none of them knew. The clock was still going, and it was right.
"""


@cache
def tokenizer_json(kind: Kind) -> str:
    """Train a BPE with a few hundred tokens; the sentencepiece kind writes spaces as "▁" and falls back to bytes."""
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|bos|>", "<|eos|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator([TEXT], trainer)
        return str(tokenizer.to_str())
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    spec = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    for byte in range(256):
        spec["model"]["vocab"][f"<0x{byte:02X}>"] = len(spec["model"]["vocab"])
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    return json.dumps(spec)


def tokenizer_config(kind: Kind) -> dict[str, object]:
    """Return the tokenizer_config.json of a tiny tokenizer."""
    if kind == "byte_level":
        return {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "tokenizer_class": "TokenizersBackend"}
    return {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}


def tiny_vocabulary(kind: Kind) -> Vocabulary:
    """Build the vocabulary of a tiny tokenizer."""
    return Vocabulary.parse(tokenizer_json(kind).encode(), json.dumps(tokenizer_config(kind)).encode(), name=kind)


def save_tiny_model(
    folder: Path,
    *,
    kind: Kind = "byte_level",
    seed: int = 1,
    head_dim: int = 8,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a Llama with 2 layers and its tokenizer as a Hugging Face directory. vLLM requires a head_dim of 32."""
    vocabulary = tiny_vocabulary(kind)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        bos_token_id=vocabulary.roles["bos"],
        eos_token_id=vocabulary.roles["eos"],
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(kind)), encoding="utf-8")
    return folder
