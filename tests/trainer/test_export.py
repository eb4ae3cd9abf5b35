"""The exported model, loaded with transformers, and its model card. vLLM loads it in tests/teachers/test_vllm.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignment import Vocabulary
from tests.needs import need
from tests.tiny import TEXT, save_tiny_model
from tests.trainer.runs import run_config, served_models, write_corpus
from tests.trainer.test_report import page_of
from trainer.chats.chat_template import ChatTemplate
from trainer.errors import CheckpointError
from trainer.evaluation.export import export_model
from trainer.evaluation.model_card import model_card
from trainer.report.history import read_history
from trainer.student.config import LoraConfig, StudentConfig
from trainer.student.loading import load_student
from trainer.student.model import Student
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train

CHATML = (
    "{% for m in messages %}{{ '<|bos|>' + m['role'] + '\\n' + m['content'] + '<|eos|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}"
)


def trained(folder: Path) -> Student:
    """Load a student and perturb its weights, so that they differ from those of the base model."""
    student = load_student(StudentConfig(model=str(folder), precision="fp32"))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return student


def export(student: Student, folder: Path, tokenizer: SampleTokenizer | None = None) -> Path:
    tokenizer = tokenizer or SampleTokenizer(student.vocabulary, student.vocabulary.prefix)
    export_model(student, student.weights(), tokenizer, folder, "a card")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# --- weights and configuration ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_has_the_dtype_and_tied_weights_of_its_base_and_the_logits_of_the_student(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=dtype, tied=tied)
    student = trained(base)
    out = export(student, tmp_path / "model")
    assert tensors(out).keys() == tensors(base).keys()
    assert ("lm_head.weight" in tensors(out)) == (not tied)
    assert {tensor.dtype for tensor in tensors(out).values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.tensor([AutoTokenizer.from_pretrained(out).encode(TEXT)[:200]])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.to(dtype))
    exact: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(exact(ids).logits, student.model(ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_merged_into_weights_with_the_dtype_and_tied_weights_of_the_base(
    tmp_path: Path, tied: bool
) -> None:
    need("peft")
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16, tied=tied)
    student = load_student(StudentConfig(model=str(base), precision="fp32", lora=LoraConfig(rank=4)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    out = export(student, tmp_path / "model")
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        difference = (loaded(ids).logits - student.model(ids).logits).abs()
    assert float(difference.max()) < 0.15  # the merged weights are rounded to bf16


def test_a_generation_config_that_transformers_cannot_save_is_copied_unchanged(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}  # sampling values without do_sample
    with pytest.raises(ValueError, match="do_sample"):
        GenerationConfig(**settings).save_pretrained(tmp_path)
    (base / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    out = export(trained(base), tmp_path / "model")
    assert json.loads((out / "generation_config.json").read_text()) == settings


def test_a_base_without_a_generation_config_gets_one_with_its_eos_token(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "generation_config.json").unlink()
    out = export(trained(base), tmp_path / "model")
    assert GenerationConfig.from_pretrained(out).eos_token_id == Vocabulary.load(base).roles["eos"]


def test_the_license_and_notice_of_the_base_are_copied_and_no_unrelated_files(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    for name in ("LICENSE", "NOTICE.txt", "README.md", "pytorch_model.bin.index.json", "special_tokens_map.json"):
        (base / name).write_text("{}", encoding="utf-8")
    out = export(trained(base), tmp_path / "model")
    assert sorted(p.name for p in out.iterdir()) == [
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "README.md").read_text() == "a card"


def test_a_student_trained_on_chats_has_the_training_template_and_its_end_of_turn_token(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ 'template of the base' }}", encoding="utf-8")
    (base / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    student = trained(base)
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.name.startswith("tokenizer")}
    template = ChatTemplate.from_files(
        files, student.vocabulary, "s", template=CHATML, roles={"end_of_turn": "<|eos|>"}
    )
    out = export(student, tmp_path / "model", SampleTokenizer(student.vocabulary, [], template))
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "six?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|bos|>user\nsix?<|eos|>\n"
    assert GenerationConfig.from_pretrained(out).eos_token_id == [7, student.vocabulary.roles["eos"]]


def test_a_failed_export_keeps_the_previous_export(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    out = export(trained(base), tmp_path / "model")
    before = tensors(out)
    (tmp_path / ".partial-model").write_text("a file instead of a folder", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot export to .*model .*: correct the cause, .*--resume"):
        export(trained(base), out)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(out).items())


# --- the model card ---


@pytest.fixture(scope="module")
def run_with_two_teachers(
    tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> Path:
    """Train with two teachers and all evaluations; return the folder of the run."""
    folder = tmp_path_factory.mktemp("two_teachers")
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        sections: dict[str, Any] = {"every_steps": 2, "agreement_samples": 2}
        train(run_config(tiny_byte_level, write_corpus(folder), folder / "out", urls, eval=sections))
    return folder / "out"


def test_the_card_lists_teachers_data_settings_and_evaluation(run_with_two_teachers: Path) -> None:
    card = ModelCard.load(run_with_two_teachers / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["tutelage", "knowledge-distillation", "model-fusion"]
    history = read_history(run_with_two_teachers)
    start = history.start
    for name in ("t0", "t1"):
        teacher = start["teachers"][name]
        assert f"| {name} | {teacher['model']} | – | {teacher['fingerprint'][:16]} |" in card.text
        assert teacher["tokenizer_sha256"][:16] in card.text
    for words in (
        f"weights {start['identity']['student weights']}",
        f"Fingerprint of the samples: {start['identity']['samples']}",
        "after 6 steps of training",
        "corpus.jsonl | 10 |",
        "method mean",
        "ce_weight 0.3",
        "precision fp32",
        f"| **these weights** | 6 | **{history.evals.columns['held_out_bpb'][-1]:.4f}** |",
        f"| base model | 0 | {history.evals.columns['held_out_bpb'][0]:.4f} |",
        f"| teacher t1 | {history.evals.columns['teachers/t1/top1'][-1]:.4f} |",
        "| fused target | ",
        f"transformers {start['software']['transformers']}",
    ):
        assert words in card.text, words


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_card_shows_the_precision_that_auto_chose(run_with_two_teachers: Path, precision: str) -> None:
    run = read_history(run_with_two_teachers)
    config = {**run.config, "student": {**run.config["student"], "precision": "auto"}}
    card = model_card(replace(run, start={**run.start, "run": config, "precision": precision}), 6, 1.0)
    assert f"precision {precision}" in card
    assert "precision auto" not in card


def test_the_card_contains_no_paths_addresses_or_texts(run_with_two_teachers: Path) -> None:
    card = (run_with_two_teachers / "model" / "README.md").read_text(encoding="utf-8")
    for secret in (str(run_with_two_teachers.parent), "127.0.0.1", "http://", "harbour", "/tmp"):
        assert secret not in card


def test_the_report_shows_the_cards_of_the_teachers_and_their_agreement(run_with_two_teachers: Path) -> None:
    page = page_of(run_with_two_teachers)
    assert read_history(run_with_two_teachers).start["teachers"]["t1"]["fingerprint"] in page.text
    assert "KL(target ‖ student) on held-out text over tokens" in page.figures


def test_the_card_of_a_run_without_teachers_does_not_mention_teachers(tmp_path: Path, tiny_byte_level: Path) -> None:
    held_out = {"held_out_documents": 0}
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], eval=held_out))
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert card.data.tags == ["tutelage"]
    assert "No text was held out" in card.text
    for absent in ("Teachers", "fusion", "–", "distilled from"):
        assert absent not in card.text


def test_names_are_escaped_in_the_card(run_with_two_teachers: Path, tmp_path: Path) -> None:
    evil = "a|b\n<script>[x](y)"
    (tmp_path / "metrics.jsonl").write_text(
        (run_with_two_teachers / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .replace('"corpus.jsonl"', json.dumps(evil)),
        encoding="utf-8",
    )
    card = model_card(read_history(tmp_path), 6, 1.0)
    assert "<script>" not in card
    assert "| a&#124;b &lt;script&gt;&#91;x&#93;(y) |" in card


def test_no_string_of_a_run_is_markup_in_its_card(run_with_two_teachers: Path, tmp_path: Path) -> None:
    evil = "<script>|**b** [x](y)\n---\nINJ: `${7*7}`{{7*7}} https://a.b www.a.b @someone"

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else evil if isinstance(value, str) else value

    lines = (run_with_two_teachers / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    events[0]["base"]["revision"] = evil
    spoilt = [{**spoil(event), "event": event["event"]} for event in events]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in spoilt), encoding="utf-8")
    card = ModelCard(model_card(read_history(tmp_path), 6, 1.0))
    assert card.data.to_dict()["base_model"] == evil
    for markup in ("<script>", "**b**", "[x]", "\nINJ", "https://", "www.a", "@"):
        assert markup not in card.text


def test_a_base_model_from_a_hub_has_its_revision_in_the_card(tmp_path: Path, tiny_byte_level: Path) -> None:
    base = tmp_path / "models--owner--tiny-one" / "snapshots" / "4f2a"
    base.parent.mkdir(parents=True)
    base.symlink_to(tiny_byte_level)
    train(run_config(base, write_corpus(tmp_path), tmp_path / "out", [], train={"epochs": 1}))
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert card.data.base_model == "owner/tiny-one"
    assert "owner/tiny-one at revision 4f2a" in card.text
