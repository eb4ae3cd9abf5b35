"""Checkpoints on disk: no pickle, a digest for every file, and the newest intact one is used."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.trainer.runs import losses, run_config, write_corpus
from trainer.config import RunConfig
from trainer.errors import CheckpointError
from trainer.manifest import MANIFEST, DamagedError, check_folder, digest_file, write_manifest
from trainer.training.checkpoint_folder import delete_old, newest_intact, set_aside_newer
from trainer.training.checkpoint_storage import write_tensors
from trainer.training.loop import train

NUM_FLIPS = 25  # in each file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path) -> RunConfig:
    """A run that stopped at step 4 of 6, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    sections = {"dir": str(folder / "out"), "checkpoint_every_steps": 2, "keep_checkpoints": 3}
    config = run_config(tiny_byte_level, write_corpus(folder), folder / "out", [], output=sections)
    train(config, stop_at=4)
    return config


@pytest.fixture
def copy(tmp_path: Path, run: RunConfig) -> RunConfig:
    """A copy of the run in a separate folder."""
    shutil.copytree(run.output.dir, tmp_path / "out")
    return run.model_copy(update={"output": run.output.model_copy(update={"dir": str(tmp_path / "out")})})


def checkpoints(config: RunConfig) -> Path:
    return Path(config.output.dir) / "checkpoints"


def used(folder: Path) -> int | None:
    """Return the step of the checkpoint that a resumed run would use."""
    newest = newest_intact(folder)
    return newest.metadata.step if newest else None


def test_a_checkpoint_holds_safetensors_and_json_only(run: RunConfig) -> None:
    newest = checkpoints(run) / "step-00000004"
    assert sorted(p.name for p in newest.iterdir()) == [MANIFEST, "shard-00001.safetensors", "state.json"]
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    assert state.keys() == {"step", "identity", "precision", "fusion_state", "rollouts"}
    with safe_open(newest / "shard-00001.safetensors", framework="pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"model", "optimizer"}  # noqa: SIM118


@pytest.mark.parametrize("name", [MANIFEST, "shard-00001.safetensors", "state.json"])
def test_one_flipped_bit_anywhere_makes_a_checkpoint_unused(
    copy: RunConfig, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints(copy) / "step-00000004" / name
    intact = path.read_bytes()
    places = {0, 7, len(intact) - 1} | {i * len(intact) // NUM_FLIPS for i in range(NUM_FLIPS)}
    for place in places:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        caplog.clear()
        assert used(checkpoints(copy)) == 2, place
        assert f"checkpoint step-00000004 is not used: {name} is damaged" in caplog.text
        assert "continuing from step-00000002" in caplog.text
    path.write_bytes(intact)
    assert used(checkpoints(copy)) == 4


def test_every_byte_of_a_manifest_is_protected(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    write_manifest(tmp_path, {"file": digest_file(tmp_path / "file")})
    check_folder(tmp_path)
    intact = (tmp_path / MANIFEST).read_bytes()
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        (tmp_path / MANIFEST).write_bytes(damaged)
        with pytest.raises(DamagedError):
            check_folder(tmp_path)


class Pickled:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "manifest.json cannot be read (No such file": lambda c: (c / MANIFEST).unlink(),
    "manifest.json is damaged": lambda c: (c / MANIFEST).write_text("[" * 200_000),
    "state.json cannot be read": lambda c: (c / "state.json").unlink(),
    "state.json is damaged (": lambda c: (c / "state.json").write_text("{}"),
    "shard-00001.safetensors is damaged (5000 bytes": lambda c: os.truncate(c / "shard-00001.safetensors", 5000),
    "shard-00001.safetensors cannot be read": lambda c: (c / "shard-00001.safetensors").unlink(),
    "state.json is not a regular file": lambda c: replace_by_fifo(c / "state.json"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(
    copy: RunConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[reason](checkpoints(copy) / "step-00000004")
    assert used(checkpoints(copy)) == 2
    assert f"checkpoint step-00000004 is not used: {reason}" in caplog.text


def test_a_run_resumes_from_the_previous_checkpoint_to_the_undisturbed_losses(
    copy: RunConfig, tmp_path: Path, tiny_byte_level: Path
) -> None:
    undisturbed = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "undisturbed", [])
    train(undisturbed)
    shard = checkpoints(copy) / "step-00000004" / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x40
    shard.write_bytes(data)
    keep_one = copy.model_copy(update={"output": copy.output.model_copy(update={"keep_checkpoints": 1})})
    assert train(keep_one, resume=True, stop_at=3).steps == 3
    assert sorted(p.name for p in checkpoints(copy).iterdir()) == ["step-00000003", "step-00000004.damaged"]
    assert train(keep_one, resume=True).steps == 6
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "undisturbed"), abs=1e-6)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert weights[0] == weights[1]
    assert sorted(p.name for p in checkpoints(copy).iterdir()) == ["step-00000004.damaged", "step-00000006"]


def test_a_pickle_in_a_checkpoint_is_not_loaded(copy: RunConfig, tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp", "state.pkl"):
        (checkpoints(copy) / "step-00000004" / name).write_bytes(pickle.dumps(Pickled(tmp_path / "ran")))
    assert train(copy, resume=True).steps == 6
    assert not (tmp_path / "ran").exists()


def test_only_files_of_the_manifest_are_read(copy: RunConfig, tmp_path: Path) -> None:
    newest = checkpoints(copy) / "step-00000004"
    with safe_open(newest / "shard-00001.safetensors", framework="pt") as file:
        name, value = next((n, file.get_tensor(n)) for n in file.keys() if n.startswith("model."))  # noqa: SIM118
    write_tensors(newest / "shard-00000.safetensors", {name: torch.zeros_like(value)}, {name: [0] * value.ndim})
    assert train(copy, resume=True).steps == 6
    assert losses(tmp_path / "out")[6] < losses(tmp_path / "out")[1]


FOREIGN: dict[str, Callable[[Path], object]] = {
    "an empty folder": lambda c: (c / "step-00000005").mkdir(),
    "a foreign folder": lambda c: shutil.copytree(c.parent / "checkpoints" / "step-00000002", c / "step-00000009"),
    "a link": lambda c: (c / "step-00000008").symlink_to("step-00000002"),
    "a file": lambda c: (c / "step-00000007").write_text("x"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_something_else_with_the_name_of_a_checkpoint_is_reported_and_kept(
    copy: RunConfig, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    FOREIGN[kind](checkpoints(copy))
    (foreign,) = {p.name for p in checkpoints(copy).iterdir()} - {"step-00000002", "step-00000004"}
    assert train(copy, resume=True).steps == 6
    assert f"checkpoint {foreign} is not used: " in caplog.text
    assert os.path.lexists(checkpoints(copy) / f"{foreign}.damaged")
    assert used(checkpoints(copy)) == 6


def test_names_match_exactly(copy: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("step-00000004.bak", "step-0000009", "step-zzz", "step--0000009", "step-٠٠٠٠٠٠٠٩", "my step-00000009"):
        shutil.copytree(checkpoints(copy) / "step-00000002", checkpoints(copy) / name)
    assert used(checkpoints(copy)) == 4
    assert not caplog.text


def test_checkpoints_of_which_none_is_intact_are_an_error_and_not_a_new_start(copy: RunConfig) -> None:
    for name in ("step-00000002", "step-00000004"):
        (checkpoints(copy) / name / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact \(checkpoint step-00000004 is not used"):
        train(copy, resume=True)


def test_deleting_old_checkpoints_follows_no_links_and_deletes_nothing_else(copy: RunConfig, tmp_path: Path) -> None:
    folder = checkpoints(copy)
    shutil.copytree(folder / "step-00000002", tmp_path / "elsewhere")
    (folder / "step-00000000").symlink_to(tmp_path / "elsewhere")
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "thesis.txt").write_text("x")
    (folder / ".partial-00000005").mkdir()
    (folder / ".partial-00000006").symlink_to(tmp_path / "elsewhere")
    set_aside_newer(folder, 4)
    delete_old(folder, 1)
    left = {".partial-00000006", "step-00000000", "step-00000001", "step-00000004"}
    assert {p.name for p in folder.iterdir()} == left
    assert (tmp_path / "elsewhere" / MANIFEST).exists()
    assert (folder / "step-00000001" / "thesis.txt").exists()


def test_a_link_in_place_of_the_checkpoints_is_rejected(copy: RunConfig, tmp_path: Path) -> None:
    checkpoints(copy).rename(tmp_path / "elsewhere")
    checkpoints(copy).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="checkpoints is a link, so that another run could write"):
        train(copy, resume=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_written_tensors_are_read_by_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.arange(24).reshape(4, 6)
    tensors = {"a": numbers.to(dtype), "columns": numbers.to(dtype)[:, ::2], "one": torch.tensor(1).to(dtype)}
    tensors |= {"none": torch.zeros(0, 3).to(dtype), "float32": torch.rand(3)}
    digest = write_tensors(tmp_path / "x.safetensors", tensors, {name: [0] * t.ndim for name, t in tensors.items()})
    assert digest == digest_file(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
