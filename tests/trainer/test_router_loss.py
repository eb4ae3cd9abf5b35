"""The router's auxiliary loss of mixture-of-experts students equals that of transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from alignment import Vocabulary
from tests.tiny import TEXT, tiny_vocabulary
from trainer.errors import ConfigError
from trainer.losses.objective import Objective
from trainer.records import DistillationExample, Sample, TokenizedSample
from trainer.student.config import StudentConfig
from trainer.student.loading import load_student
from trainer.student.model import Student
from trainer.tokenization import SampleTokenizer
from trainer.training.plan import StepPlan
from trainer.training.step import StepResult, train_step

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
}


def save_moe(folder: Path, base: Path, family: str = "mixtral", coef: float = 0.5, on: bool = True) -> Path:
    """Save a mixture of four experts with the byte-level tokenizer of `base`."""
    torch.manual_seed(4)
    shape: dict[str, Any] = SHAPE | {"vocab_size": len(tiny_vocabulary("byte_level"))}
    shape |= {"output_router_logits": on, "router_aux_loss_coef": coef}
    model: Any = (
        MixtralForCausalLM(MixtralConfig(num_local_experts=4, **shape))
        if family == "mixtral"
        else Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, moe_intermediate_size=32, **shape))
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder


def load(folder: Path, **config: Any) -> Student:
    return load_student(StudentConfig(model=str(folder), precision="fp32", **config))


def texts(num: int) -> list[str]:
    return [TEXT[60 * i : 60 * i + 40 + 11 * i] for i in range(num)]


def examples(vocabulary: Vocabulary, num: int) -> list[DistillationExample]:
    tokenizer = SampleTokenizer(vocabulary, vocabulary.prefix)
    samples = [Sample(i, f"s{i}", text) for i, text in enumerate(texts(num))]
    return [example(sample, tokenizer.tokenize(sample)) for sample in samples]


def example(sample: Sample, tokenized: TokenizedSample) -> DistillationExample:
    return DistillationExample(sample, tokenized, None)


def step(student: Student, num_samples: int, microbatches: int = 1) -> StepResult:
    """Take one step of plain training without changing the weights."""
    objective = Objective(1.0)
    plan = StepPlan(0.0, objective, microbatches, 1e9, ())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    return train_step(student, optimizer, examples(student.vocabulary, num_samples), plan)


def loss_of_transformers(folder: Path, num_samples: int) -> tuple[float, float]:
    """Return the auxiliary loss of a padded batch, and the loss of its first text with the auxiliary loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = Vocabulary.load(folder)
    ids = [vocabulary.encode(text).ids.tolist() for text in texts(num_samples)]
    length = max(map(len, ids))
    ids_BL = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask_BL = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    with torch.no_grad():
        batch = model(ids_BL, attention_mask=mask_BL, output_router_logits=True)
        first = model(torch.tensor(ids[:1]), labels=torch.tensor(ids[:1]))
    return float(batch.aux_loss), float(first.loss)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_loss_is_that_of_transformers(tmp_path: Path, tiny_byte_level: Path, family: str) -> None:
    folder = save_moe(tmp_path / "m", tiny_byte_level, family)
    expected, expected_total = loss_of_transformers(folder, 3)
    student = load(folder)
    assert student.packing
    assert step(student, 3).router_loss == pytest.approx(expected, rel=1e-5)
    assert step(student, 1).loss == pytest.approx(expected_total, rel=1e-5)


def test_the_model_config_decides_unless_the_run_file_does(tmp_path: Path, tiny_byte_level: Path) -> None:
    off = save_moe(tmp_path / "off", tiny_byte_level, on=False)
    plain = step(load(off), 2)
    assert plain.router_loss is None
    assert plain.loss is not None
    for folder, configured, weight in (
        (save_moe(tmp_path / "on", tiny_byte_level, coef=10.0), None, 10.0),
        (off, 0.25, 0.25),
    ):
        result = step(load(folder, router_aux_loss_weight=configured), 2)
        assert result.router_loss is not None
        assert result.loss == pytest.approx(plain.loss + weight * result.router_loss, rel=1e-5)
        assert result.grad_norm != pytest.approx(plain.grad_norm, rel=1e-3)
    assert step(load(tmp_path / "on", router_aux_loss_weight=0.0), 2).loss == pytest.approx(plain.loss)


def test_microbatches_are_weighted_with_their_tokens(tmp_path: Path, tiny_byte_level: Path) -> None:
    student = load(save_moe(tmp_path / "m", tiny_byte_level))
    whole, parts = step(student, 4), step(student, 4, microbatches=2)
    lengths = [len(e.tokenized.tokens) for e in examples(student.vocabulary, 4)]
    folder = tmp_path / "m"
    first = loss_of_transformers(folder, 2)[0]
    assert whole.router_loss == pytest.approx(loss_of_transformers(folder, 4)[0], rel=1e-5)
    assert parts.router_loss == pytest.approx(whole.router_loss, rel=0.05)
    assert first * sum(lengths[:2]) < (parts.router_loss or 0) * sum(lengths)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of peft
@pytest.mark.parametrize("config", [{"activation_checkpointing": True}, {"lora": {"rank": 2}}, {"train_layers": 1}])
def test_other_ways_to_train_compute_the_same_loss(
    tmp_path: Path, tiny_byte_level: Path, config: dict[str, Any]
) -> None:
    folder = save_moe(tmp_path / "m", tiny_byte_level)
    assert step(load(folder, **config), 2).router_loss == pytest.approx(loss_of_transformers(folder, 2)[0], rel=1e-5)


def test_a_rank_without_samples_takes_part(tmp_path: Path, tiny_byte_level: Path) -> None:
    student = load(save_moe(tmp_path / "m", tiny_byte_level))
    *_, loss = student.compute([], [], lambda head, states: (states.sum(),), router_loss=True)
    assert float(loss.detach()) == 0
    assert loss.requires_grad


def test_a_weight_for_a_model_without_experts_is_refused(tiny_byte_level: Path) -> None:
    with pytest.raises(ConfigError, match="router_aux_loss_weight is 0.1, but transformers has no auxiliary loss"):
        load(tiny_byte_level, router_aux_loss_weight=0.1)
    assert json.loads((tiny_byte_level / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
