"""Resumption with changed settings, which is reported, and with another teacher of the same name, which is an error."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teachers import model_dirs
from tests.tiny import save_tiny_model
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from trainer.cli.console import progress_listener
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.telemetry.jsonl import read_metrics
from trainer.training import identity
from trainer.training.loop import train
from trainer.training.run import begin


def test_another_teacher_with_the_same_name_is_rejected(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus, out = write_corpus(tmp_path), tmp_path / "out"
    other_model = save_tiny_model(tmp_path / "other_model", kind="byte_level", seed=7)
    with served_models(tiny_byte_level) as urls:
        train(run_config(tiny_byte_level, corpus, out, urls), stop_at=2)
    with served_models(other_model) as urls:
        config = run_config(tiny_byte_level, corpus, out, urls)
        before = (out / "metrics.jsonl").read_text(encoding="utf-8")
        with pytest.raises(ConfigError, match=r"teacher t0 was byte_level .*, and is now other_model with \w+: serve"):
            train(config, resume=True)
        assert (out / "metrics.jsonl").read_text(encoding="utf-8") == before
        [teacher] = config.teachers
        renamed = config.model_copy(update={"teachers": [teacher.model_copy(update={"name": "new"})]})
        assert train(renamed, resume=True).steps == 6
    starts = [event for event in read_metrics(out / "metrics.jsonl") if event["event"] == "start"]
    assert [start["changed"] for start in starts] == [{}, {"teachers": [["t0"], ["new"]]}]


def test_a_run_without_checkpoint_accepts_another_teacher(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus, out = write_corpus(tmp_path), tmp_path / "out"
    other_model = save_tiny_model(tmp_path / "other_model", kind="byte_level", seed=7)
    for model in (tiny_byte_level, other_model):
        with served_models(model) as urls:
            train(run_config(tiny_byte_level, corpus, out, urls), resume=True, stop_at=1)
        (checkpoint,) = (out / "checkpoints").iterdir()
        checkpoint.rename(tmp_path / f"moved-{model.name}")
    assert len(losses(out)) == 1


def test_changed_settings_are_printed_and_listed_in_the_model_card(
    tmp_path: Path, tiny_byte_level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path)
    with corpus.open("a", encoding="utf-8") as file:
        file.write("no\n")

    def resume(stop_at: int | None, **sections: dict[str, Any]) -> None:
        config = run_config(tiny_byte_level, corpus, tmp_path / "out", [], data={"max_invalid": 1}, **sections)
        train(config, resume=True, stop_at=stop_at, listener=progress_listener("run"))

    resume(2)
    stderr = capsys.readouterr().err
    assert "1 invalid records are skipped" in stderr
    assert "line 11: expected a JSON object, received 'no'" in stderr
    assert "checkpoint saved after step 2: continue with --resume" in stderr
    resume(4, optim={"lr": 1e-3}, train={"prefetch_tokens": 99})
    assert "changed since the previous start: optim.lr 0.003 → 0.001" in capsys.readouterr().err
    resume(None, optim={"lr": 1e-3})
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"changed after step .*", card) == ["changed after step 2 | optim.lr 0.003 → 0.001 |"]
    starts = [event for event in read_metrics(tmp_path / "out" / "metrics.jsonl") if event["event"] == "start"]
    assert [sorted(start["changed"]) for start in starts] == [
        [],
        ["optim.lr", "train.prefetch_tokens"],
        ["train.prefetch_tokens"],
    ]


@pytest.mark.parametrize("resolved", ["bf16", "fp32"])
def test_a_resumed_run_keeps_the_precision_that_auto_resolved_to(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, resolved: str
) -> None:
    """The run is resumed on a device for which `auto` would resolve to the other precision."""

    def native(value: bool) -> None:
        monkeypatch.setattr("trainer.student.loading.bf16_is_native", lambda _: value)

    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], student={"precision": "auto"})
    native(resolved == "bf16")
    train(config, stop_at=2)
    native(resolved != "bf16")
    run = begin(config, Ranks(), resume=True)
    assert (run.precision, run.student.autocast) == (resolved, resolved == "bf16")
    train(config, resume=True, stop_at=3)
    starts = [event for event in read_metrics(tmp_path / "out" / "metrics.jsonl") if event["event"] == "start"]
    assert [start["precision"] for start in starts] == [resolved, resolved]
    other = "fp32" if resolved == "bf16" else "bf16"
    explicit = config.model_copy(update={"student": config.student.model_copy(update={"precision": other})})
    assert begin(explicit, Ranks(), resume=True).precision == other


@dataclass(frozen=True, eq=False)
class ThreadRanks(Ranks):
    """A rank in a thread. The collectives use a list of values and a barrier that all ranks share."""

    values: Any = None
    barrier: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(20)
        values = list(self.values)
        self.barrier.wait(20)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def all_reduce_sum(self, values: Any) -> list[float]:
        return [sum(column) for column in zip(*self.all_gather(values), strict=True)]


def on_ranks(local_ranks: list[int], function: Callable[[Ranks], Any]) -> list[Any]:
    """Call the function in a thread per rank. Return the results, or the errors that were raised, by rank."""
    size = len(local_ranks)
    values, barrier = [None] * size, threading.Barrier(size)
    ranks = [ThreadRanks(n, size, local, values=values, barrier=barrier) for n, local in enumerate(local_ranks)]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, rank) for rank in ranks]
    return [future.exception() or future.result() for future in futures]


TWO_MACHINES = [0, 1, 0, 1]  # local ranks


def test_the_base_weights_are_hashed_once_per_machine(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = list[Path]()

    def counting(folder: Path) -> str:
        hashed.append(folder)
        return model_dirs.weights_sha256(folder)

    monkeypatch.setattr(identity, "weights_sha256", counting)
    folders = [tmp_path / "first" if rank < 2 else tmp_path / "second" for rank in range(4)]
    for folder in set(folders):
        folder.symlink_to(tiny_byte_level)
    results = on_ranks(TWO_MACHINES, lambda ranks: identity.base_weights_sha256(folders[ranks.rank], ranks))
    assert results == [model_dirs.weights_sha256(tiny_byte_level)] * 4
    assert sorted(hashed) == [tmp_path / "first", tmp_path / "second"]


def test_different_base_weights_on_two_machines_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    models = [save_tiny_model(tmp_path / str(seed), kind="byte_level", seed=seed) for seed in (1, 1, 2, 2)]
    errors = on_ranks(TWO_MACHINES, lambda ranks: identity.base_weights_sha256(models[ranks.rank], ranks))
    for error in errors:
        assert isinstance(error, ConfigError)
        assert re.search(r"process 0 has student weights \w{16}, process 2 has \w{16}", str(error))


def test_the_first_rank_of_each_machine_runs_before_the_others() -> None:
    order = list[int]()

    def run(ranks: Ranks) -> None:
        with ranks.local_rank_zero_first():
            order.append(ranks.rank)

    on_ranks(TWO_MACHINES, run)
    assert (set(order[:2]), set(order[2:])) == ({0, 2}, {1, 3})


def test_ranks_of_one_machine_take_turns() -> None:
    order = list[int]()

    def run(ranks: Ranks) -> None:
        with ranks.one_per_machine_at_a_time():
            order.append(ranks.local_rank)

    on_ranks([0, 1, 2, 0, 1], run)
    assert order == [0, 0, 1, 1, 2]


def test_all_ranks_use_the_precision_that_auto_resolves_to_on_rank_0(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPUs of two machines differ."""
    loaded = dict[int, str]()
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], student={"precision": "auto"})
    first = threading.local()

    def load(student: Any, ranks: Ranks) -> None:
        loaded[ranks.rank] = student.precision
        raise ConfigError("stop")

    def start(ranks: Ranks) -> RunConfig:
        first.value = ranks.first
        begin(config, ranks, resume=False)
        return config

    monkeypatch.setattr("trainer.student.loading.bf16_is_native", lambda _: first.value)
    monkeypatch.setattr("trainer.training.run.load_student", load)
    on_ranks([0, 0], start)
    assert loaded == {0: "bf16", 1: "bf16"}
