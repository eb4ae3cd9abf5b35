"""Untrusted model directories: student, engine and doctor execute no code, agree, and fail with one sentence."""

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from alignment import TokenizerError, Vocabulary
from kernel_cache.hub_cache import file_inside
from teachers.engines.model_files import served_tokenizer
from teachers.engines.transformers import TransformersEngine
from teachers.model_checks import ModelError, check_model_files, model_errors
from teachers.model_loading import check_finite, check_for_vllm, load_model, read_config
from teachers.protocol.errors import TeacherError
from tests.tiny import save_tiny_model
from trainer.errors import ConfigError
from trainer.student.checks import check_folder
from trainer.student.config import StudentConfig
from trainer.student.hf_directory import write_hf_directory
from trainer.student.loading import load_student, prepare_module

Change = Callable[[Path], Any]
KERNELS = "kernels-community/flash-attn3"


def settings(file: str = "config.json", **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def write(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data)


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def header_length(length: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return change


def shortened(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Code(folder / "MARK")))


class _Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def with_code(**values: Any) -> Change:
    def change(folder: Path) -> None:
        auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
        settings(auto_map=auto_map, **values)(folder)
        for path in (folder / "code.py", folder / "custom_generate" / "generate.py"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"import os; os.mkdir({str(folder / 'MARK')!r})", encoding="utf-8")

    return change


def index(shard: str) -> Change:
    return write("model.safetensors.index.json", json.dumps({"weight_map": {"a": shard}}).encode())


def sharded(num_files: int, with_index: bool = True) -> Change:
    """Split the weights into two shards, of which `num_files` exist."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
        for name in list(shards)[:num_files]:
            save_file({n: tensors[n] for n in shards[name]}, folder / name, metadata={"format": "pt"})
        content = {"metadata": {}, "weight_map": {n: name for name, part in shards.items() for n in part}}
        if with_index:
            (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")

    return change


def only(name: str, data: bytes) -> Change:
    """Leave the tokenizer, and one other file."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if not path.name.startswith("tokenizer"):
                path.unlink()
        (folder / name).write_bytes(data)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


ADAPTER = b'{"base_model_name_or_path": "org/base"}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
QUANTIZED: dict[str, Change] = {
    "awq": settings(quantization_config={"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "gptq": settings(quantization_config={"quant_method": "gptq", "bits": 4}),
    "bitsandbytes": settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "compressed-tensors": settings(quantization_config={"quant_method": "compressed-tensors"}),
    "compression_config": settings(compression_config={"format": "pack-quantized"}),
    "fp8": settings(quantization_config={"quant_method": "fp8"}),
    "quantize_config.json": write("quantize_config.json", b"{}"),
}
GATE = "model.layers.0.mlp.gate_proj.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "pickle": (pickled, "weights are pickled.*convert them to safetensors"),
    "code": (with_code(model_type="weird"), r"requires custom code \(auto_map\), which is never executed"),
    "adapter": (write("adapter_config.json", b"{}"), "merge the adapter into the weights of its base model"),
    "adapter alone": (
        only("adapter_config.json", ADAPTER),
        "an adapter of org/base: merge the adapter into",
    ),
    "GGUF": (only("model.gguf", b"GGUF"), "its weights are a GGUF file: convert them to safetensors"),
    "LFS weights": (write("model.safetensors", LFS), "model.safetensors is a pointer of Git LFS.*`git lfs pull`"),
    "LFS config": (write("config.json", LFS), "config.json is a pointer of Git LFS, not the file"),
    "other head": (
        weights(other_head),
        "lm_head.weight differs from .*embed_tokens.weight: set tie_word_embeddings",
    ),
    "no head": (settings(tie_word_embeddings=False), "lack the model's head.*set tie_word_embeddings to true"),
    "one shard of two": (sharded(1), "model-00002-of-00002.safetensors', which is missing, as 1 of 2 files are"),
    "shards without index": (sharded(2, with_index=False), "are 2 shards without model.safetensors.index.json"),
    "named weights": (settings(transformers_weights="../x.safetensors"), "names a file of weights"),
    "header of 2^63": (header_length(1 << 63), "truncated or not safetensors"),
    "header of 90 MB": (header_length(90_000_000), "truncated or not safetensors"),
    "header of 0": (header_length(0), "is not JSON"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors of 0 bytes is truncated"),
    "shortened weights": (shortened, "ends after the end of its file"),
    "index out of the folder": (index("../s/model.safetensors"), "expected the name of a file of the folder"),
    "missing shard": (index("gone.safetensors"), "names 'gone.safetensors'"),
    "NaN": (weights(lambda w: w[GATE].view(-1)[7:8].fill_(float("nan"))), f"the weight {GATE} has values that are NaN"),
    "infinite": (weights(lambda w: w[GATE].view(-1)[7:8].fill_(float("inf"))), "NaN or infinite"),
    "integers": (weights(lambda w: w.update({GATE: w[GATE].long()})), f"{GATE}' is stored as I64"),
    "shape": (weights(lambda w: w.update({GATE: w[GATE][:3].clone()})), r"has shape \[3, 32\], its config.json"),
    "missing weight": (weights(lambda w: w.pop(GATE)), f"lack 1 of the model's weights, for example {GATE}"),
    "many layers": (settings(num_hidden_layers=20_000), "declares 20000 layers"),
    "large vocabulary": (settings(vocab_size=10**12), "declares 1000000000000 tokens of hidden size 32"),
    "large layers": (settings(intermediate_size=10**11), "declares [0-9]+ weights"),
    "no layers": (settings(num_hidden_layers=-1), "expected a number above 0 as num_hidden_layers, received '-1'"),
    "text as number": (settings(hidden_size="32"), "hidden_size"),
    "no heads": (settings(num_attention_heads=0), "cannot load"),
    "dtype": (settings(dtype="os.system"), "cannot load"),
    "half a config": (write("config.json", b"{"), "config.json is not JSON"),
    "list as config": (write("config.json", b"[]"), "expected a JSON object, received list"),
    "nested config": (write("config.json", b"[" * 100_000), "config.json is not JSON"),
    "generation config": (write("generation_config.json", b"{"), "generation_config.json is not JSON"),
    "nested tokenizer": (write("tokenizer.json", b'{"a":' + b"[" * 100_000), "RecursionError"),
    "no tokenizer": (write("tokenizer.json", b"[]"), "cannot (be read|load)"),
    "nested tokenizer config": (write("tokenizer_config.json", b"[" * 100_000), "RecursionError"),
}
ACCEPTED: dict[str, Change] = {
    "kernels": settings(attn_implementation=KERNELS, experts_implementation="sonicmoe", use_kernels=True),
    "private names of kernels": settings(_attn_implementation=KERNELS, _attn_implementation_internal=KERNELS),
    "code beside a known model": with_code(),
    "no EOS": settings(eos_token_id=[]),
    "shards": sharded(2),
    "stored tied head": weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})),
    "own head": both(weights(other_head), settings(tie_word_embeddings=False)),
}
LEFT_TO_VLLM = ("code", "shape", "missing weight", "large layers", "text as number", "no heads", "dtype")


def doctor(folder: Path) -> None:
    limits = check_folder(folder, StudentConfig(model=str(folder)))
    Vocabulary.load(folder).within(limits.num_ids)
    prepare_module(StudentConfig(model=str(folder)), folder)


def student(folder: Path) -> None:
    load_student(StudentConfig(model=str(folder)))


def engine(folder: Path) -> None:
    TransformersEngine(folder).close()


def before_vllm(folder: Path) -> None:
    """Make the checks of the vLLM engine before it starts vLLM."""
    check_for_vllm(folder)
    served_tokenizer(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_or_hostile_folder_is_one_sentence_everywhere(tmp_path: Path, name: str) -> None:
    folder = save_tiny_model(tmp_path / "m")
    change, reason = REFUSED[name]
    change(folder)
    began = time.monotonic()
    uses: list[tuple[Callable[[Path], None], type[Exception]]]
    uses = [(doctor, ConfigError), (student, ConfigError), (engine, TeacherError), (before_vllm, TeacherError)]
    for use, error in uses[: 3 if name in LEFT_TO_VLLM else 4]:
        with pytest.raises((error, TokenizerError), match=reason) as caught:
            use(folder)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 700
    assert not (folder / "MARK").exists()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_what_a_config_names_is_neither_loaded_nor_executed(tmp_path: Path, change: Change) -> None:
    folder = save_tiny_model(tmp_path / "m")
    expected = load_model(folder, torch.float32).config._attn_implementation
    change(folder)
    for use in (doctor, student, engine, before_vllm):
        use(folder)
    assert load_model(folder, torch.float32).config._attn_implementation == expected == "sdpa"
    assert read_config(folder)._experts_implementation is None
    assert not (folder / "MARK").exists()


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_served_with_vllm_only(tmp_path: Path, name: str) -> None:
    folder = save_tiny_model(tmp_path / "m")
    QUANTIZED[name](folder)
    quantized = rf"its weights are quantized \({name}\), "
    for use in (doctor, student):
        with pytest.raises(ConfigError, match=f"{quantized}and quantized weights cannot be trained: use the model's"):
            use(folder)
    with pytest.raises(TeacherError, match=f"{quantized}.*: serve it with --engine vllm"):
        engine(folder)
    before_vllm(folder)


def test_a_folder_is_never_executed_after_an_answer_on_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path / "m")
    with_code(model_type="weird")(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match="never executed"):
        load_model(folder, torch.float32)
    assert not (folder / "MARK").exists()


def test_a_fifo_or_a_folder_as_config_is_one_sentence(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ModelError, match="it has no file config.json"):
        check_model_files(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_of_a_weight_is_checked(dtype: torch.dtype) -> None:
    large = torch.full((1000,), 6e4, dtype=dtype)
    for finite in (large, torch.cat([large, -large]), torch.empty(0, dtype=dtype), torch.arange(3)):
        check_finite("finite", finite)
    for value in ("nan", "inf", "-inf"):
        for position in (0, 500, 999):
            weight = large.clone()
            weight[position] = float(value)
            with pytest.raises(ValueError, match="the weight large has values that are NaN"):
                check_finite("large", weight)


def test_a_panic_is_an_error_of_the_folder_and_an_interrupt_is_not(tmp_path: Path) -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(ModelError, match=f"cannot load {tmp_path} on cuda: Panic: at the disco"):
        with model_errors(tmp_path, " on cuda"):
            raise Panic("at the\x1b disco\nsecond line".replace("\x1b", ""))
    with pytest.raises(KeyboardInterrupt):
        with model_errors(tmp_path):
            raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="kept"):
        with model_errors(tmp_path, keep=ConfigError):
            raise ConfigError("kept")


def test_an_export_and_a_server_follow_no_link_out_of_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key", encoding="utf-8")
    folder = save_tiny_model(tmp_path / "m")
    for name in ("LICENSE", "chat_template.jinja", "vocab.json"):
        (folder / name).symlink_to(secret)
    (folder / "tokenizer_secret.json").write_text("{}", encoding="utf-8")
    (folder / "NOTICE.txt").symlink_to("config.json")
    model = load_model(folder, torch.float32)
    write_hf_directory(model, model.state_dict(), base=folder, folder=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"NOTICE.txt", "tokenizer.json"} <= names
    assert not names & {"LICENSE", "chat_template.jinja", "vocab.json", "tokenizer_secret.json"}
    assert "chat_template.jinja" not in served_tokenizer(folder)


def test_links_of_a_hub_cache_lead_to_the_blobs_of_their_own_model(tmp_path: Path) -> None:
    own, other = tmp_path / "models--a--b", tmp_path / "models--a--c"
    snapshot = own / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for model in (own, other):
        (model / "blobs").mkdir(parents=True)
        (model / "blobs" / "f").write_text("{}", encoding="utf-8")
    (snapshot / "own.json").symlink_to("../../blobs/f")
    (snapshot / "other.json").symlink_to("../../../models--a--c/blobs/f")
    (snapshot / "gone.json").symlink_to("../../blobs/gone")
    os.mkfifo(snapshot / "fifo.json")
    found = [file_inside(snapshot, f"{name}.json") for name in ("own", "other", "gone", "fifo")]
    assert found == [snapshot / "own.json", None, None, None]


def test_a_config_is_exported_in_the_stored_type(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", dtype=torch.bfloat16)
    model = load_model(folder, torch.float32)
    write_hf_directory(model, model.state_dict(), base=folder, folder=tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
