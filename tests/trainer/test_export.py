"""The exported model: as transformers loads it (vLLM: tests/teachers/test_vllm.py), and what its card says."""

import json
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
from trainer.config import LoraConfig, StudentConfig
from trainer.data.chat import ChatTemplate
from trainer.data.reading import Reader
from trainer.errors import CheckpointError
from trainer.learning.student import Student, load_student
from trainer.loop import train
from trainer.reports.history import read_history
from trainer.results.export import export_model
from trainer.results.model_card import model_card

CHATML = (
    "{% for m in messages %}{{ '<|bos|>' + m['role'] + '\\n' + m['content'] + '<|eos|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\\n' }}{% endif %}"
)


def trained(folder: Path) -> Student:
    """A student whose weights are no longer its base's."""
    student = load_student(StudentConfig(model=str(folder), precision="fp32"))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return student


def export(student: Student, folder: Path, reader: Reader | None = None) -> Path:
    reader = reader or Reader(student.vocabulary, student.vocabulary.prefix)
    export_model(student, student.weights(), reader, folder, "a card")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# --- as others load it ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_type_and_the_ties_of_its_base_and_the_students_logits(
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
def test_adapters_are_merged_into_the_type_and_the_ties_of_the_base(tmp_path: Path, tied: bool) -> None:
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


def test_a_generation_config_that_transformers_refuses_to_save_is_kept_as_it_is(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    said = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}  # of a model on the hub: sampling without do_sample
    with pytest.raises(ValueError, match="do_sample"):
        GenerationConfig(**said).save_pretrained(tmp_path)
    (base / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    out = export(trained(base), tmp_path / "model")
    assert json.loads((out / "generation_config.json").read_text()) == said


def test_a_base_without_a_generation_config_gets_one_that_knows_its_end(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "generation_config.json").unlink()
    out = export(trained(base), tmp_path / "model")
    assert GenerationConfig.from_pretrained(out).eos_token_id == Vocabulary.load(base).roles["eos"]


def test_the_terms_of_the_base_and_no_other_file_go_with_it(tmp_path: Path) -> None:
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


def test_a_student_of_chats_takes_the_template_that_it_learned_and_ends_with_its_turn(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ 'of the base' }}", encoding="utf-8")
    (base / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    student = trained(base)
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.name.startswith("tokenizer")}
    template = ChatTemplate.from_files(
        files, student.vocabulary, "s", template=CHATML, roles={"end_of_turn": "<|eos|>"}
    )
    out = export(student, tmp_path / "model", Reader(student.vocabulary, [], template))
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "six?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|bos|>user\nsix?<|eos|>\n"
    assert GenerationConfig.from_pretrained(out).eos_token_id == [7, student.vocabulary.roles["eos"]]


def test_what_stood_there_stays_where_the_new_cannot_be_written(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    out = export(trained(base), tmp_path / "model")
    before = tensors(out)
    broken = trained(base)
    (tmp_path / ".partial-model").write_text("a file where a folder is to be", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot export to .*model .*: make room"):
        export(broken, out)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(out).items())


# --- the card ---


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path, tiny_sentencepiece: Path) -> Path:
    """The folder of a run with two teachers and all figures."""
    folder = tmp_path_factory.mktemp("two")
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        sections: dict[str, Any] = {"every_steps": 2, "agreement_samples": 2}
        train(run_config(tiny_byte_level, write_corpus(folder), folder / "out", urls, eval=sections))
    return folder / "out"


def test_the_card_says_what_the_model_was_made_of(run_of_two: Path) -> None:
    card = ModelCard.load(run_of_two / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["tutelage", "knowledge-distillation", "model-fusion"]
    history = read_history(run_of_two)
    start = history.start
    for name in ("t0", "t1"):
        said = start["teachers"][name]
        assert f"| {name} | {said['model']} | – | {said['fingerprint'][:16]} |" in card.text
        assert said["tokenizer_sha256"][:16] in card.text
    for words in (
        f"weights {start['identity']['student weights']}",
        f"Fingerprint of the samples: {start['identity']['samples']}",
        "after 6 steps of training",
        "corpus.jsonl | 10 |",
        "method mean",
        "ce_weight 0.3",
        f"| **these weights** | 6 | **{history.evals.columns['held_out_bpb'][-1]:.4f}** |",
        f"| base model | 0 | {history.evals.columns['held_out_bpb'][0]:.4f} |",
        f"| teacher t1 | {history.evals.columns['teachers/t1/top1'][-1]:.4f} |",
        "their fusion",
        f"transformers {start['software']['transformers']}",
    ):
        assert words in card.text, words


def test_the_card_names_no_place_and_holds_no_text(run_of_two: Path) -> None:
    card = (run_of_two / "model" / "README.md").read_text(encoding="utf-8")
    for secret in (str(run_of_two.parent), "127.0.0.1", "http://", "harbour", "/tmp"):
        assert secret not in card


def test_the_report_shows_the_cards_of_the_teachers_and_their_agreement(run_of_two: Path) -> None:
    page = page_of(run_of_two)
    assert read_history(run_of_two).start["teachers"]["t1"]["fingerprint"] in page.text
    assert "KL(target ‖ student) on held-out text over tokens" in page.figures


def test_a_plain_run_has_a_card_without_teachers(tmp_path: Path, tiny_byte_level: Path) -> None:
    held_out = {"held_out_documents": 0}
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], eval=held_out))
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert card.data.tags == ["tutelage"]
    assert "Nothing was held out" in card.text
    for absent in ("Teachers", "fusion", "–", "taught by"):
        assert absent not in card.text


def test_what_names_hold_is_text_in_the_card_and_never_markup(run_of_two: Path, tmp_path: Path) -> None:
    evil = "a|b\n<script>[x](y)"
    (tmp_path / "metrics.jsonl").write_text(
        (run_of_two / "metrics.jsonl").read_text(encoding="utf-8").replace('"corpus.jsonl"', json.dumps(evil)),
        encoding="utf-8",
    )
    card = model_card(read_history(tmp_path), 6, 1.0)
    assert "<script>" not in card
    assert "| a&#124;b &lt;script&gt;&#91;x&#93;(y) |" in card


def test_a_base_from_a_hub_is_named_with_its_revision(tmp_path: Path, tiny_byte_level: Path) -> None:
    base = tmp_path / "models--owner--tiny-one" / "snapshots" / "4f2a"
    base.parent.mkdir(parents=True)
    base.symlink_to(tiny_byte_level)
    train(run_config(base, write_corpus(tmp_path), tmp_path / "out", [], train={"epochs": 1}))
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert card.data.base_model == "owner/tiny-one"
    assert "owner/tiny-one at revision 4f2a" in card.text
