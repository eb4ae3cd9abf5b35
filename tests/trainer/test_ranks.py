"""Several processes train as one: real torchrun, gloo, FSDP2."""

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
from tests.trainer.runs import held_out, losses, run_config, served_models, write_corpus
from tests.trainer.test_cli import run_file
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.ranks import Ranks, joined
from trainer.reports.metrics import read_metrics
from trainer.run import begin, check_alike, make_folder


def torchrun(config: RunConfig, ranks: int, *more: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """`tutelage train` of this run file in several processes."""
    done = subprocess.run(command(config, ranks, *more), capture_output=True, text=True, timeout=480, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def command(config: RunConfig, ranks: int, *more: str) -> list[str]:
    path = Path(config.output.dir).with_suffix(".json")
    path.write_text(config.model_dump_json(), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "tests.trainer.rank_main", str(path), *more]


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
        sections: dict[str, Any] = {"train": {"accumulate": 2}, "loss": {"divergence": "jensen_shannon"}}
        config = {n: run_config(student, corpus, tmp_path / n, urls, **sections) for n in ("one", "two")}
        train(config["one"])
        torchrun(config["two"], 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert_equal_models(tmp_path / "one", tmp_path / "two")


def test_a_run_of_one_rank_goes_on_with_two_and_with_one_again(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    straight = run_config(tiny_byte_level, corpus, tmp_path / "straight", [])
    train(straight)
    changing = run_config(tiny_byte_level, corpus, tmp_path / "changing", [])
    train(changing, stop_at=2)
    torchrun(changing, 2, "--resume", "--stop-at=4")
    train(changing, resume=True)
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)


def test_two_ranks_train_adapters_and_export_them_merged(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    sections: dict[str, Any] = {"student": {"lora": {"rank": 4}}, "optim": {"lr": 1e-2}}
    config = {n: run_config(tiny_byte_level, corpus, tmp_path / n, [], **sections) for n in ("one", "two")}
    train(config["one"])
    torchrun(config["two"], 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    assert_equal_models(tmp_path / "one", tmp_path / "two")


def test_ranks_that_would_train_something_else_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"process 0 has optim.lr = 0.1, process 2 has 0.2: all machines need the"):
        check_alike([{"optim.lr": lr, "samples": "a"} for lr in (0.1, 0.1, 0.2)])


class OneOfTwo(Ranks):
    """A rank whose other one is made up: it names the mark, and sees it."""

    def agreed(self, value: Any) -> Any:
        return value if self.first else ".seen-by-the-other"

    def gathered(self, mine: Any) -> list[Any]:
        return [mine, True] if self.first else [True, mine]


def test_an_output_folder_of_another_machine_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.ranks.APPEARS_S", 0.3)
    assert Ranks().blind_to(tmp_path) == OneOfTwo(0, 2).blind_to(tmp_path) == []
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ConfigError, match=r"process 1 does not see what process 0 writes: give a folder on a disk that"
    ):
        make_folder(tmp_path, OneOfTwo(1, 2))
    (tmp_path / ".seen-by-the-other").touch()
    make_folder(tmp_path, OneOfTwo(1, 2))


def test_processes_without_a_gpu_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="start the processes with torchrun"), joined("cuda"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "1000")
    with pytest.raises(ConfigError, match="process 1000 of this machine"), joined("cuda"):
        pass


def test_two_ranks_in_bf16_with_recomputed_adapters_learn_as_one_in_float32(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    """To the rounding of bf16, with weights gathered in it and hidden states recomputed."""
    corpus, lora = write_corpus(tmp_path), {"lora": {"rank": 4, "dropout": 0.0}}
    mixed = lora | {"precision": "bf16", "activation_checkpointing": True}
    optim = {"lr": 1e-2}
    train(run_config(tiny_byte_level, corpus, tmp_path / "one", [], student=lora, optim=optim))
    torchrun(run_config(tiny_byte_level, corpus, tmp_path / "two", [], student=mixed, optim=optim), 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", tolerance=0.03)
    assert losses(tmp_path / "one") != pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="student.device is cuda:1, which all processes would take"), joined("cuda:1"):
        pass


def test_a_batch_of_fewer_samples_than_processes_is_refused(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], train={"batch_samples": 1})
    with pytest.raises(ConfigError, match="batch_samples is 1, fewer than the 2 processes"):
        begin(config, Ranks(0, 2), resume=False)
    assert not (tmp_path / "out").exists()


def test_sigterm_saves_and_ends_cleanly(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus, sections = write_corpus(tmp_path), {"train": {"epochs": 30}}
    straight = run_config(tiny_byte_level, corpus, tmp_path / "straight", [], **sections)
    train(straight)
    told = run_config(tiny_byte_level, corpus, tmp_path / "told", [], **sections)
    tutelage = [sys.executable, "-m", "trainer.cli", "train", str(run_file(tmp_path, told))]
    process = subprocess.Popen(tutelage, stderr=subprocess.DEVNULL)
    while not (tmp_path / "told" / "metrics.jsonl").exists() or not losses(tmp_path / "told"):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    events = read_metrics(tmp_path / "told" / "metrics.jsonl")
    done = max(losses(tmp_path / "told"))
    assert events[-1] == events[-1] | {"event": "end", "step": done, "model": None}
    assert (tmp_path / "told" / "checkpoints" / f"step-{done:08d}").is_dir()
    train(told, resume=True)
    assert losses(tmp_path / "told") == pytest.approx(losses(tmp_path / "straight"), abs=1e-6)


def test_parts_of_all_ranks_together_are_the_batch() -> None:
    for size in range(1, 9):
        for items in range(12):
            parts = [Ranks(rank, size).part(range(items)) for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(items))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
