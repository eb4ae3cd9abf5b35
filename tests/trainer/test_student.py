"""Training options of the student: adapters, frozen layers, precision, compilation, and model families."""

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

from teachers.model_loading import bf16_is_native
from tests.needs import need_command
from tests.tiny import TEXT, save_tiny_model, tiny_vocabulary
from tests.trainer.runs import held_out, losses, run_config, write_corpus
from trainer.errors import ConfigError
from trainer.evaluation.bits_per_byte import Evaluation, evaluate
from trainer.student.checks import check_folder, check_head
from trainer.student.config import LoraConfig, StudentConfig
from trainer.student.loading import load_student, resolve_precision
from trainer.student.model import lm_head_of
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train

SIZES: Any = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_adapters_are_trained_and_merged_for_export(tmp_path: Path, tiny_byte_level: Path, device: str) -> None:
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
    from trainer.sources.corpus import load_corpus

    corpus = load_corpus(config.data, config.eval, student.vocabulary, 0)
    tokenizer = SampleTokenizer(student.vocabulary, student.vocabulary.prefix)
    measured = sum(evaluate(student, [tokenizer.tokenize(s) for s in corpus.held_out], 64), Evaluation())
    assert measured.bpb == pytest.approx(after, abs=2e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile emits its own warnings
def test_compiled_layers_give_the_same_losses(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    need_command("g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    corpus = write_corpus(tmp_path)
    for name in ("plain", "compiled"):
        student = {"device": device, "compile": name == "compiled"}
        only = {"data": {"max_samples": 4}, "eval": {"held_out_documents": 0}}  # every kind of pass is compiled again
        train(run_config(tiny_byte_level, corpus, tmp_path / name, [], student=student, **only))
    assert list((tmp_path / "inductor").rglob("*.so" if device == "cpu" else "*.cubin"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_a_resumed_run_with_adapters_gives_the_same_losses(tmp_path: Path, tiny_byte_level: Path) -> None:
    """This includes dropout: the random state of a step depends on the seed and the step only."""
    corpus = write_corpus(tmp_path)
    sections: dict[str, Any] = {"student": {"lora": {"rank": 4, "dropout": 0.2}}}
    uninterrupted, resumed = (
        run_config(tiny_byte_level, corpus, tmp_path / n, [], **sections) for n in ("uninterrupted", "resumed")
    )
    train(uninterrupted)
    train(resumed, stop_at=3)
    train(resumed, resume=True)
    assert losses(tmp_path / "uninterrupted") == pytest.approx(losses(tmp_path / "resumed"), abs=1e-6)


@pytest.mark.parametrize("trained", [{"lora": LoraConfig(rank=4)}, {"train_layers": 1}], ids=["adapters", "upper"])
def test_frozen_matrices_in_bf16_give_bit_identical_results(
    tmp_path: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    results = []
    for cast in (True, False):
        if not cast:
            monkeypatch.setattr("trainer.student.loading.cast_frozen_to_bf16", lambda _: None)
        torch.manual_seed(0)  # initializes new adapters
        student = load_student(StudentConfig(model=str(base), device=device, precision="bf16", **trained))
        dtypes = {p.requires_grad: p.dtype for name, p in student.model.named_parameters() if name.count("_proj")}
        assert dtypes == {True: torch.float32, False: torch.bfloat16 if cast else torch.float32}
        text = student.vocabulary.encode(TEXT[:200])
        (states,) = student.compute([text], [np.ones(len(text) - 1, dtype=bool)], lambda _, states_TD: (states_TD,))
        states.float().square().sum().backward()
        results.append([states, *(p.grad for p in student.parameters()), *student.weights().values()])
    for with_cast, without_cast in zip(*results, strict=True):
        assert torch.equal(with_cast.float(), without_cast.float())


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_frozen_weights_stay_float32_if_bf16_would_change_them(
    tmp_path: Path, dtype: torch.dtype, precision: Any
) -> None:
    base = save_tiny_model(tmp_path / "base", dtype=dtype)
    student = load_student(StudentConfig(model=str(base), precision=precision, train_layers=1))
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("native", [False, True])
def test_precision_auto_is_bf16_where_the_device_computes_it_natively(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False, raising=False)
    assert bf16_is_native("cpu") == native
    assert resolve_precision("auto", "cpu") == ("bf16" if native else "fp32")
    assert resolve_precision("auto", "cuda:1") == "bf16"
    for precision in ("bf16", "fp32"):
        assert resolve_precision(precision, "cpu") == precision
    with pytest.raises(ConfigError, match="student.precision: expected auto, bf16 or fp32, received 'fp16'"):
        resolve_precision("fp16", "cpu")


def test_bf16_is_not_native_on_a_cpu_if_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(f"torch.cpu.{name}", raising=False)
    assert not bf16_is_native("cpu")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nowhere"], "student.lora.targets"),
        (["lm_head"], "the head cannot have an adapter"),
        (["embed_tokens", "q_proj"], "the embeddings cannot have an adapter"),
    ],
)
def test_adapters_of_unknown_layers_head_and_embeddings_are_rejected(
    tmp_path: Path, targets: list[str], message: str
) -> None:
    model = save_tiny_model(tmp_path / "m", kind="byte_level", seed=1, tied=False)
    with pytest.raises(ConfigError, match=message):
        load_student(StudentConfig(model=str(model), lora=LoraConfig(targets=targets)))


def test_activation_checkpointing_changes_no_loss(tmp_path: Path, tiny_byte_level: Path, device: str) -> None:
    corpus = write_corpus(tmp_path)
    for name in ("plain", "checkpointed"):
        student = {"device": device, "activation_checkpointing": name == "checkpointed"}
        train(run_config(tiny_byte_level, corpus, tmp_path / name, [], train={"steps": 3}, student=student))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointed"), abs=1e-5)


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
    """Save a Gemma 3 model, which has two kinds of layers."""
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile emits its own warnings
def test_layers_stay_compiled_for_batches_of_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses dynamo without a backend: dynamo decides about recompilation and its limit."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda layer: compiled(layer, backend="eager"))
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 8)
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    folder = save_deep_model(tmp_path / "deep", layers=4)
    student = load_student(StudentConfig(model=str(folder), precision="fp32", compile=True))
    text = student.vocabulary.encode(TEXT)
    for lengths in ([60] * 8, [41, 20, 15], [60, 50, 30, 20], [60] * 4, [33], [30, 14, 44], [12, 20, 50], [31] * 6):
        samples = [text.excerpt(slice(0, length), 0, 0) for length in lengths]
        masks = [np.ones(length - 1, dtype=bool) for length in lengths]
        for training in (False, True):
            with torch.set_grad_enabled(training):
                (states,) = student.compute(samples, masks, lambda _, states_TD: (states_TD,))
            if training:
                states.sum().backward()
            assert states.isfinite().all()


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def multimodal_gemma_3(**text: Any) -> Any:
    vision = VISION | {"image_size": 28, "patch_size": 14}
    tokens: Any = {"image_token_id": 3, "boi_token_id": 4, "eoi_token_id": 5, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


def multimodal_gemma_4(**text: Any) -> Any:
    further: Any = {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    further |= {"vocab_size_per_layer_input": text["vocab_size"], "layer_types": ["full_attention"]}
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 8}
    tokens: Any = {"image_token_id": 400, "video_token_id": 401, "audio_token_id": 402}
    config = Gemma4Config(text_config=text | further, vision_config=vision, audio_config=None, **tokens)
    return Gemma4ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [multimodal_gemma_3, multimodal_gemma_4])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "adapters"])
def test_a_multimodal_model_is_trained_on_text_resumed_and_exported_completely(
    tmp_path: Path, make: Any, lora: dict[str, Any] | None
) -> None:
    base = save_tiny_model(tmp_path / "base")
    make(**SIZES | {"vocab_size": len(tiny_vocabulary("byte_level")), "head_dim": 16}).save_pretrained(base)
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    for name in ("uninterrupted", "resumed"):
        config = run_config(base, write_corpus(tmp_path), tmp_path / name, [], student={"lora": lora})
        if name == "resumed":
            train(config, stop_at=3)
        train(config, resume=name == "resumed")
    assert losses(tmp_path / "uninterrupted") == pytest.approx(losses(tmp_path / "resumed"), abs=1e-6)
    model = tmp_path / "resumed" / "model"
    assert (model / "preprocessor_config.json").is_file()
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "vision" in name or "projector" in name]


def test_a_model_without_causal_language_model_is_rejected_before_loading(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    Mistral3Config(text_config={"model_type": "mistral", **SIZES}).save_pretrained(folder)
    with pytest.raises(ConfigError, match="no causal language model for mistral3"):
        check_folder(folder, StudentConfig(model=str(folder)))


def test_a_model_without_separate_decoder_is_rejected(tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size_mlp": 48, "head_dim": 16, "num_local_experts": 2}
    with pytest.raises(
        ConfigError,
        match="Llama4ForCausalLM is not supported: transformers does not separate its decoder from its head",
    ):
        check_head(Llama4ForCausalLM(Llama4TextConfig(**sizes)))


@pytest.mark.parametrize(
    "model",
    [
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    ],
    ids=["cohere", "granite"],
)
def test_heads_with_scaled_logits_are_supported(model: Any) -> None:
    torch.manual_seed(0)
    built = model()
    assert lm_head_of(built).scale != 1
    check_head(built)


def test_a_model_with_another_function_of_its_logits_is_rejected(tiny_byte_level: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_byte_level)
    model.lm_head.register_forward_hook(lambda _module, _given, logits: logits * 2)
    with pytest.raises(
        ConfigError,
        match="LlamaForCausalLM is not supported: its logits differ by .* from those of its output projection",
    ):
        check_head(model)


def test_adapters_and_train_layers_exclude_each_other(tmp_path: Path, tiny_byte_level: Path) -> None:
    with pytest.raises(ValueError, match="remove student.train_layers"):
        run_config(tiny_byte_level, tmp_path, tmp_path, [], student={"lora": {}, "train_layers": 1})
