"""Shared parts: tiny models once a session, the real ones where `tutelage demo --prepare` has put them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from alignment import Vocabulary
from tests.tiny import save_tiny_model
from trainer.paths import resolve_model_dir
from trainer.sources import data_file
from trainer.sources import window_index as index

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup lets what it starts ignore it
transformers_logging.disable_progress_bar()
settings.register_profile("tutelage", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.register_profile("fast", settings.get_profile("tutelage"), max_examples=15)  # of `make test-fast`
settings.load_profile("tutelage")


@pytest.hookimpl(tryfirst=True)  # before -m deselects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a real model as slow."""
    for item in items:
        if {"smollm2", "gemma"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def windows_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models come from the cache, but what tests index does not go there."""
    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "windows_dir", lambda: folder)
        patch.setattr(data_file, "converted_dir", lambda: folder / "converted")
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a model lives: the same test on the CPU and, where there is one (`make test-gpu`), on a GPU."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "byte_level", kind="byte_level", seed=1)


@pytest.fixture(scope="session")
def tiny_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "sentencepiece", kind="sentencepiece", seed=2)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return resolve_model_dir("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma() -> Path:
    return resolve_model_dir("gemma-3-270m")


@pytest.fixture(scope="session")
def smollm2_vocabulary(smollm2: Path) -> Vocabulary:
    return Vocabulary.load(smollm2)


@pytest.fixture(scope="session")
def gemma_vocabulary(gemma: Path) -> Vocabulary:
    return Vocabulary.load(gemma)
