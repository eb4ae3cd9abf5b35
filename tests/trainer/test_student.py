"""What of a student is trained and how: adapters, activation checkpointing, heads of all families."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Mistral3Config,
)

from tests.needs import need_command
from tests.tiny import TEXT, save_tiny_model, tiny_vocabulary
from tests.trainer.runs import held_out, losses, run_config, write_corpus
from trainer.config import LoraConfig, StudentConfig
from trainer.data.reading import Reader
from trainer.errors import ConfigError
from trainer.learning.student import check_folder, check_head, head_of, load_student
from trainer.loop import train
from trainer.results.evaluate import Evaluation, evaluate

SIZES: Any = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_adapters_learn_and_are_merged_on_export(tmp_path: Path, tiny_byte_level: Path, device: str) -> None:
    student_section = {"device": device, "lora": {"rank": 4, "dropout": 0.1}}
    sections: dict[str, Any] = {"student": student_section, "train": {"epochs": 6}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], optim={"lr": 1e-2}, **sections)
    train(config, stop_at=9)
    result = train(config, resume=True)
    before, after = held_out(tmp_path / "out")[0], held_out(tmp_path / "out")[18]
    assert after < before - 0.05
    assert result.model is not None
    exported = StudentConfig(model=str(result.model), precision="fp32")
    student = load_student(exported)
    assert not [name for name, _ in student.model.named_parameters() if "lora" in name]
    from trainer.data.samples import load_corpus

    corpus = load_corpus(config.data, config.eval, student.vocabulary, 0)
    reader = Reader(student.vocabulary, student.vocabulary.prefix)
    measured = sum(evaluate(student, [reader.read(s) for s in corpus.held_out], 64), Evaluation())
    assert measured.bpb == pytest.approx(after, abs=2e-3)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
def test_compiled_layers_give_the_same_losses(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    need_command("g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    corpus = write_corpus(tmp_path)
    for name in ("plain", "compiled"):
        student = {"device": device, "compile": name == "compiled"}
        only = {"data": {"max_samples": 4}, "eval": {"held_out_documents": 0}}  # each kind of pass is compiled anew
        train(run_config(tiny_byte_level, corpus, tmp_path / name, [], student=student, **only))
    assert list((tmp_path / "inductor").rglob("*.so" if device == "cpu" else "*.cubin"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_a_run_of_adapters_is_the_same_after_a_resume(tmp_path: Path, tiny_byte_level: Path) -> None:
    """Dropout too: a step's random state comes from the seed and the step."""
    corpus = write_corpus(tmp_path)
    sections: dict[str, Any] = {"student": {"lora": {"rank": 4, "dropout": 0.2}}}
    straight, halves = (
        run_config(tiny_byte_level, corpus, tmp_path / n, [], **sections) for n in ("straight", "halves")
    )
    train(straight)
    train(halves, stop_at=3)
    train(halves, resume=True)
    assert losses(tmp_path / "straight") == pytest.approx(losses(tmp_path / "halves"), abs=1e-6)


@pytest.mark.parametrize("trained", [{"lora": LoraConfig(rank=4)}, {"train_layers": 1}], ids=["adapters", "upper"])
def test_frozen_matrices_take_half_the_memory_and_change_no_bit(
    tmp_path: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    results = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr("trainer.learning.student.halve_frozen", lambda _: None)
        torch.manual_seed(0)  # of new adapters
        student = load_student(StudentConfig(model=str(base), device=device, **trained))
        dtypes = {p.requires_grad: p.dtype for name, p in student.model.named_parameters() if name.count("_proj")}
        assert dtypes == {True: torch.float32, False: torch.bfloat16 if kept else torch.float32}
        text = student.vocabulary.encode(TEXT[:200])
        (states,) = student.compute([text], [np.ones(len(text) - 1, dtype=bool)], lambda _, states_TD: (states_TD,))
        states.float().square().sum().backward()
        results.append([states, *(p.grad for p in student.parameters()), *student.weights().values()])
    for half, whole in zip(*results, strict=True):
        assert torch.equal(half.float(), whole.float())


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_frozen_weights_stay_float32_where_bf16_would_change_them(
    tmp_path: Path, dtype: torch.dtype, precision: Any
) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=dtype)
    student = load_student(StudentConfig(model=str(base), precision=precision, train_layers=1))
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nowhere"], "student.lora.targets"),
        (["lm_head"], "the head cannot have an adapter"),
        (["embed_tokens", "q_proj"], "the embeddings cannot have an adapter"),
    ],
)
def test_adapters_of_no_layer_and_at_the_ends_are_refused(tmp_path: Path, targets: list[str], message: str) -> None:
    model = save_tiny_model(tmp_path / "m", kind="byte_level", seed=1, tied=False)
    with pytest.raises(ConfigError, match=message):
        load_student(StudentConfig(model=str(model), lora=LoraConfig(targets=targets)))


def test_activation_checkpointing_changes_no_loss(tmp_path: Path, tiny_byte_level: Path, device: str) -> None:
    corpus = write_corpus(tmp_path)
    for name in ("plain", "less"):
        student = {"device": device, "activation_checkpointing": name == "less"}
        train(run_config(tiny_byte_level, corpus, tmp_path / name, [], train={"steps": 3}, student=student))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "less"), abs=1e-5)


def test_activation_checkpointing_computes_only_trained_layers_twice(tmp_path: Path) -> None:
    folder = save_deep_model(tmp_path / "deep", layers=4)
    config = StudentConfig(model=str(folder), precision="fp32", train_layers=1, activation_checkpointing=True)
    student, times = load_student(config), [0] * 4
    for i, layer in enumerate(student.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: times.__setitem__(i, times[i] + 1))
    text = student.vocabulary.encode(TEXT[:100])
    (states,) = student.compute([text], [np.ones(len(text) - 1, dtype=bool)], lambda _, states_TD: (states_TD,))
    states.sum().backward()
    assert times == [1, 1, 1, 2]


def save_deep_model(folder: Path, layers: int) -> Path:
    """A Gemma 3, whose layers are of two kinds."""
    save_tiny_model(folder, kind="byte_level", seed=0)
    kinds = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
    sizes = SIZES | {
        "vocab_size": len(tiny_vocabulary("byte_level")),
        "num_hidden_layers": layers,
        "head_dim": 16,
        "layer_types": kinds,
    }
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=16)).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
def test_layers_stay_compiled_for_every_kind_of_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamo alone, which decides when a layer is compiled again and when that was too often."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer: compiled(layer, backend="eager"))
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 8)
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    folder = save_deep_model(tmp_path / "deep", layers=4)
    student = load_student(StudentConfig(model=str(folder), precision="fp32", compile=True))
    text = student.vocabulary.encode(TEXT)
    for lengths in ([60] * 8, [41, 20, 15], [60, 50, 30, 20], [60] * 4, [33], [30, 14, 44], [12, 20, 50], [31] * 6):
        parts = [text.part(slice(0, length), 0, 0) for length in lengths]
        wanted = [np.ones(length - 1, dtype=bool) for length in lengths]
        for learning in (False, True):
            with torch.set_grad_enabled(learning):
                (states,) = student.compute(parts, wanted, lambda _, states_TD: (states_TD,))
            if learning:
                states.sum().backward()
            assert states.isfinite().all()


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def gemma_3_with_eyes(**text: Any) -> Any:
    vision = VISION | {"image_size": 28, "patch_size": 14}
    tokens: Any = {"image_token_id": 3, "boi_token_id": 4, "eoi_token_id": 5, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


def gemma_4_without_ears(**text: Any) -> Any:
    further: Any = {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    further |= {"vocab_size_per_layer_input": text["vocab_size"], "layer_types": ["full_attention"]}
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 8}
    tokens: Any = {"image_token_id": 400, "video_token_id": 401, "audio_token_id": 402}
    config = Gemma4Config(text_config=text | further, vision_config=vision, audio_config=None, **tokens)
    return Gemma4ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gemma_3_with_eyes, gemma_4_without_ears])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "adapters"])
def test_a_model_that_sees_learns_from_text_resumes_and_is_exported_whole(
    tmp_path: Path, make: Any, lora: dict[str, Any] | None
) -> None:
    base = save_tiny_model(tmp_path / "base")
    make(**SIZES | {"vocab_size": len(tiny_vocabulary("byte_level")), "head_dim": 16}).save_pretrained(base)
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    for name in ("straight", "halves"):
        config = run_config(base, write_corpus(tmp_path), tmp_path / name, [], student={"lora": lora})
        if name == "halves":
            train(config, stop_at=3)
        train(config, resume=name == "halves")
    assert losses(tmp_path / "straight") == pytest.approx(losses(tmp_path / "halves"), abs=1e-6)
    model = tmp_path / "halves" / "model"
    assert (model / "preprocessor_config.json").is_file()
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "vision" in name or "projector" in name]


def test_a_model_that_is_no_language_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    Mistral3Config().save_pretrained(folder)
    with pytest.raises(ConfigError, match="no causal language model for mistral3"):
        check_folder(folder, run_config(folder, write_corpus(tmp_path), tmp_path / "out", []))


def test_a_model_that_does_not_say_what_its_trunk_is_is_refused(tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size_mlp": 48, "head_dim": 16, "num_local_experts": 2}
    with pytest.raises(ConfigError, match="Llama4ForCausalLM does not say what of it is its trunk"):
        check_head(Llama4ForCausalLM(Llama4TextConfig(**sizes)))


@pytest.mark.parametrize(
    "model",
    [
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    ],
    ids=["cohere", "granite"],
)
def test_heads_that_scale_their_logits_are_known(model: Any) -> None:
    torch.manual_seed(0)
    built = model()
    assert head_of(built).scale != 1
    check_head(built)


def test_a_model_that_makes_its_logits_otherwise_is_refused(tiny_byte_level: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_byte_level)
    model.lm_head.register_forward_hook(lambda _module, _given, logits: logits * 2)
    with pytest.raises(ConfigError, match="makes its logits in a way that is not known here"):
        check_head(model)


def test_adapters_and_upper_layers_exclude_each_other(tmp_path: Path, tiny_byte_level: Path) -> None:
    with pytest.raises(ValueError, match="leave student.train_layers out"):
        run_config(tiny_byte_level, tmp_path, tmp_path, [], student={"lora": {}, "train_layers": 1})
