"""Random changes of valid input at every boundary: a correct value or one sentence, within memory and time limits."""

import resource
from random import Random

import pytest

from tests.boundaries import Boundary, boundaries, fuzz

pytestmark = pytest.mark.slow

SECONDS, INPUTS = 3.0, 2000  # per boundary
MAX_SECONDS, MAX_GROWTH_MB = 10.0, 400


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Boundary]:
    return {boundary.name: boundary for boundary in boundaries(tmp_path_factory.mktemp("boundaries"))}


NAMES = (
    "rows", "card", "completion", "SGLang results", "echo completion", "request", "tokenizer byte_level",
    "tokenizer sentencepiece", "run file", "metrics", "text lines", "chat lines", "chats", "text", "json array", "csv",
    "compressed lines", "compressed text", "arrow", "parquet", "template", "model folder", "checkpoint",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_mutated_input_is_a_correct_value_or_one_sentence(by_name: dict[str, Boundary], name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = fuzz(by_name[name], Random(0), inputs=INPUTS, seconds=SECONDS)
    assert tally.faults == {}
    assert tally.slowest_s < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MAX_GROWTH_MB
    assert len(tally.outcomes) >= 2  # the mutations reach values that are accepted and values that are rejected


def test_every_boundary_is_tested(by_name: dict[str, Boundary]) -> None:
    assert set(NAMES) == set(by_name)


@pytest.mark.parametrize("name", NAMES)
def test_valid_input_is_accepted(by_name: dict[str, Boundary], name: str) -> None:
    for seed in by_name[name].seeds:
        by_name[name].read(seed)
