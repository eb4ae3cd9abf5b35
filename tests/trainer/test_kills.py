"""Ranks killed at random steps, under torchrun and under Ray Train: the losses stay the same."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import started
from tests.trainer.ranks import command, train_on_ranks
from tests.trainer.runs import held_out, losses, run_config, served_models, write_corpus
from trainer.config import RunConfig

KILLS = int(os.environ.get("TUTELAGE_KILLS", "2"))  # each takes a restart of all ranks, half a minute here
RAY_KILLS = max(1, KILLS // 2)  # a restart under Ray takes a minute
STEPS = 36
TIMEOUT_S = 600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path) -> RunConfig:
    """Train with two ranks to the end, and return the run config."""
    folder = tmp_path_factory.mktemp("kills")
    sections = {"output": {"checkpoint_every_steps": 2}, "train": {"epochs": 12}}
    config = run_config(tiny_byte_level, write_corpus(folder), folder / "undisturbed", [], **sections)
    train_on_ranks(config, 2)
    return config


def with_output_dir(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})})


def kill_ranks(folder: Path, ranks: Callable[[], list[psutil.Process]], launcher: psutil.Popen, kills: int) -> None:
    """Send SIGKILL to a random rank `kills` times, each time after some more steps.

    An error shows the end of the launcher's log, `folder`.txt.
    """
    rng, deadline = random.Random(0), time.monotonic() + TIMEOUT_S
    for kill in range(kills):
        after = (2 * kill + 1) * STEPS // (2 * kills) + rng.randrange(3)
        while not (steps_done(folder) >= after and (alive := ranks())):
            assert launcher.poll() is None, f"the launcher ended after {kill} kills\n{log_of(folder)}"
            assert time.monotonic() < deadline, f"{kill} kills in {TIMEOUT_S} s"
            time.sleep(0.02)
        rng.choice(alive).kill()
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in alive):
            assert time.monotonic() < deadline, "a rank outlived the other one"
            time.sleep(0.05)


def log_of(folder: Path) -> str:
    """Return the end of the log of the launcher of a run."""
    return folder.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")[-5000:]


def steps_done(folder: Path) -> int:
    return max(losses(folder), default=0) if (folder / "metrics.jsonl").exists() else 0


def assert_same_losses(undisturbed: RunConfig, killed: Path) -> None:
    expected = Path(undisturbed.output.dir)
    assert len(losses(killed)) == STEPS
    assert losses(killed) == pytest.approx(losses(expected), abs=1e-6)
    assert held_out(killed)[STEPS] == pytest.approx(held_out(expected)[STEPS], abs=1e-6)


@pytest.mark.parametrize(
    "section",
    [{"fusion": {"method": "adaptive"}}, {"rollout": {"prompt_tokens": 8, "max_new_tokens": 200, "top_p": 0.9}}],
    ids=["fusion", "rollout"],
)
def test_terminating_one_rank_stops_all_ranks(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, section: dict[str, Any]
) -> None:
    """The next batch of the other rank needs statistics or samples of the terminated rank, and must not wait."""
    sections = section | {"train": {"epochs": 400, "prefetch_tokens": 1}, "data": {"window_tokens": 250}}
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "terminated", urls, **sections)
        with started(command(config, 2, "--pause=0.05")) as launcher:
            while steps_done(tmp_path / "terminated") < 3:
                assert launcher.poll() is None
                time.sleep(0.1)
            rank = next(p for p in launcher.children(recursive=True) if "tests.trainer.run_rank" in p.cmdline())
            rank.terminate()
            assert launcher.wait(120) == 0
    done = steps_done(tmp_path / "terminated")
    assert 3 <= done < 1200
    assert (tmp_path / "terminated" / "checkpoints" / f"step-{done:08d}").is_dir()


def test_ranks_killed_under_torchrun_change_no_loss(tmp_path: Path, undisturbed: RunConfig) -> None:
    killed = tmp_path / "killed"
    launcher = command(with_output_dir(undisturbed, killed), 2, "--resume", "--pause=0.1")
    launcher.insert(launcher.index("-m", 2), f"--max-restarts={KILLS}")
    with started(launcher, killed.with_suffix(".txt")) as process:
        kill_ranks(killed, process.children, process, KILLS)
        assert process.wait(timeout=240) == 0, log_of(killed)
    assert_same_losses(undisturbed, killed)


def test_workers_killed_under_ray_train_change_no_loss(tmp_path: Path, undisturbed: RunConfig) -> None:
    killed = tmp_path / "killed"
    path = tmp_path / "killed.json"
    path.write_text(with_output_dir(undisturbed, killed).model_dump_json(), encoding="utf-8")
    launcher = [sys.executable, "-m", "tests.trainer.ray_main", str(path), "2", str(RAY_KILLS)]
    with started(launcher, killed.with_suffix(".txt")) as process:

        def workers() -> list[psutil.Process]:
            return [p for p in process.children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]

        kill_ranks(killed, workers, process, RAY_KILLS)
        assert process.wait(timeout=240) == 0, log_of(killed)
    assert_same_losses(undisturbed, killed)
