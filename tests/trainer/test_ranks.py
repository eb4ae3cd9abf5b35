"""Training with several processes: gloo, FSDP2."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_model
from tests.trainer.ranks import train_on_ranks
from tests.trainer.runs import held_out, losses, run_config, served_models, write_corpus
from tests.trainer.test_cli import run_file
from tests.trainer.test_router_loss import save_moe
from trainer.distributed import Ranks, process_group
from trainer.errors import ConfigError
from trainer.telemetry.jsonl import read_metrics
from trainer.training.identity import check_same_settings
from trainer.training.loop import train
from trainer.training.run import begin, make_folder

pytestmark = pytest.mark.slow


def assert_equal_runs(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(two), abs=tolerance)
    assert held_out(one) == pytest.approx(held_out(two), abs=tolerance)


def assert_equal_models(*runs: Path) -> None:
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(run / "model") for run in runs]
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_one_and_two_ranks_give_the_same_losses(tmp_path: Path, tiny_sentencepiece: Path, tied: bool) -> None:
    student = save_tiny_model(tmp_path / "student", kind="byte_level", seed=1, tied=tied)
    corpus = write_corpus(tmp_path)
    with served_models(tiny_sentencepiece) as urls:
        sections: dict[str, Any] = {
            "train": {"gradient_accumulation_steps": 2},
            "loss": {"divergence": "jensen_shannon"},
        }
        config = {n: run_config(student, corpus, tmp_path / n, urls, **sections) for n in ("one", "two")}
        train(config["one"])
        train_on_ranks(config["two"], 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert_equal_models(tmp_path / "one", tmp_path / "two")


def test_a_run_resumes_with_another_number_of_ranks(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    uninterrupted = run_config(tiny_byte_level, corpus, tmp_path / "uninterrupted", [])
    train(uninterrupted)
    changing = run_config(tiny_byte_level, corpus, tmp_path / "changing", [])
    train(changing, stop_at=2)
    train_on_ranks(changing, 2, "--resume", "--stop-at=4")
    train(changing, resume=True)
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "uninterrupted"), abs=1e-5)


def test_a_last_batch_with_fewer_samples_than_ranks_is_trained_on(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    sections = {"train": {"batch_samples": 11, "epochs": 1}}
    config = {n: run_config(tiny_byte_level, corpus, tmp_path / n, [], **sections) for n in ("one", "two")}
    assert train(config["one"]).steps == 2  # 11 samples, then 1
    train_on_ranks(config["two"], 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")


def test_two_ranks_train_adapters_and_export_them_merged(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    sections: dict[str, Any] = {"student": {"lora": {"rank": 4}}, "optim": {"lr": 1e-2}}
    config = {n: run_config(tiny_byte_level, corpus, tmp_path / n, [], **sections) for n in ("one", "two")}
    train(config["one"])
    train_on_ranks(config["two"], 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert_equal_models(tmp_path / "one", tmp_path / "two")


def test_two_ranks_train_a_mixture_of_experts_as_two_microbatches_do(tmp_path: Path, tiny_byte_level: Path) -> None:
    """The router's loss is not linear in the batch, so that both runs need microbatches of the same samples."""
    corpus, student = write_corpus(tmp_path), save_moe(tmp_path / "student", tiny_byte_level, "qwen3_moe")
    train_section = {"batch_samples": 4, "epochs": 1}
    one = train_section | {"gradient_accumulation_steps": 2}
    train(run_config(student, corpus, tmp_path / "one", [], train=one))
    train_on_ranks(run_config(student, corpus, tmp_path / "two", [], train=train_section), 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert_equal_models(tmp_path / "one", tmp_path / "two")
    router_losses = [
        [event["router_loss"] for event in read_metrics(tmp_path / run / "metrics.jsonl") if event["event"] == "step"]
        for run in ("one", "two")
    ]
    assert router_losses[0] == pytest.approx(router_losses[1], rel=1e-5)


def test_ranks_with_different_settings_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"process 0 has optim.lr = 0.1, process 2 has 0.2: all machines need the"):
        check_same_settings([{"optim.lr": lr, "samples": "a"} for lr in (0.1, 0.1, 0.2)])


class OneOfTwo(Ranks):
    """One of two ranks without the other process. The other rank sees the marker, and names it if it is rank 0."""

    def broadcast(self, value: Any) -> Any:
        return value if self.first else ".visible-to-the-other"

    def all_gather(self, value: Any) -> list[Any]:
        return [value, True] if self.first else [True, value]


def test_an_output_folder_that_is_not_shared_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.distributed.VISIBLE_TIMEOUT_S", 0.3)
    assert Ranks().ranks_without(tmp_path) == OneOfTwo(0, 2).ranks_without(tmp_path) == []
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"process 1 does not see what process 0 writes: use a folder on a disk that"):
        make_folder(tmp_path, OneOfTwo(1, 2))
    (tmp_path / ".visible-to-the-other").touch()
    make_folder(tmp_path, OneOfTwo(1, 2))


def test_more_processes_than_gpus_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="start the processes with torchrun"), process_group("cuda"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "1000")
    with pytest.raises(ConfigError, match="process 1000 of this machine"), process_group("cuda"):
        pass


def test_two_ranks_in_bf16_with_checkpointed_adapters_match_one_in_float32(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    """Losses agree up to the rounding of bf16, with bf16 all-gather of weights and activation checkpointing."""
    corpus, lora = write_corpus(tmp_path), {"lora": {"rank": 4, "dropout": 0.0}}
    mixed = lora | {"precision": "bf16", "activation_checkpointing": True}
    optim = {"lr": 1e-2}
    train(run_config(tiny_byte_level, corpus, tmp_path / "one", [], student=lora, optim=optim))
    train_on_ranks(run_config(tiny_byte_level, corpus, tmp_path / "two", [], student=mixed, optim=optim), 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", tolerance=0.03)
    assert losses(tmp_path / "one") != pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_one_gpu_for_all_processes_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="student.device is cuda:1, which all processes would use"),
        process_group("cuda:1"),
    ):
        pass


def test_a_batch_of_fewer_samples_than_processes_is_rejected(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], train={"batch_samples": 1})
    with pytest.raises(ConfigError, match="batch_samples is 1, fewer than the 2 processes"):
        begin(config, Ranks(0, 2), resume=False)
    assert not (tmp_path / "out").exists()


def test_sigterm_saves_a_checkpoint_and_ends_the_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus, sections = write_corpus(tmp_path), {"train": {"epochs": 30}}
    uninterrupted = run_config(tiny_byte_level, corpus, tmp_path / "uninterrupted", [], **sections)
    train(uninterrupted)
    terminated = run_config(tiny_byte_level, corpus, tmp_path / "terminated", [], **sections)
    tutelage = [sys.executable, "-m", "trainer.cli", "train", str(run_file(tmp_path, terminated))]
    process = subprocess.Popen(tutelage, stderr=subprocess.DEVNULL)
    while not (tmp_path / "terminated" / "metrics.jsonl").exists() or not losses(tmp_path / "terminated"):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    events = read_metrics(tmp_path / "terminated" / "metrics.jsonl")
    done = max(losses(tmp_path / "terminated"))
    assert events[-1] == events[-1] | {"event": "end", "step": done, "model": None}
    assert (tmp_path / "terminated" / "checkpoints" / f"step-{done:08d}").is_dir()
    train(terminated, resume=True)
    assert losses(tmp_path / "terminated") == pytest.approx(losses(tmp_path / "uninterrupted"), abs=1e-6)


def test_the_shards_of_all_ranks_are_the_batch() -> None:
    for size in range(1, 9):
        for items in range(12):
            shards = [Ranks(rank, size).shard(range(items)) for rank in range(size)]
            assert [i for shard in shards for i in shard] == list(range(items))
            assert max(map(len, shards)) - min(map(len, shards)) <= 1
