"""`doctor` and `train` agree about every run file: both call the checks of trainer/training/start_checks.py."""

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alignment import TokenizerError
from tests.serve import FormulaEngine, serving
from tests.tiny import save_tiny_model
from tests.trainer.runs import run_config, write_corpus
from trainer.cli.run_checks import examine
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.errors import UserError
from trainer.query.connect import connect_teachers
from trainer.tokenization import SampleTokenizer
from trainer.training.run import begin

MAX_TOKENS = 512  # of the tiny models
ABSENT = ("peft", "wandb", "mlflow")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return tiny students with and without BOS, a corpus, a served teacher and an output folder."""
    folder = tmp_path_factory.mktemp("checks")
    students = {
        "bos": save_tiny_model(folder / "bos", kind="sentencepiece", seed=2),
        "no_bos": save_tiny_model(folder / "no_bos", kind="byte_level", seed=1),
    }
    with_eos, without_eos = FormulaEngine(students["no_bos"]), FormulaEngine(students["no_bos"])
    with_eos.tokenizer_files["tokenizer_config.json"] = (students["no_bos"] / "tokenizer_config.json").read_bytes()
    with serving(with_eos) as url, serving(without_eos) as url_without_eos:
        urls = {True: url, False: url_without_eos}
        yield {"students": students, "corpus": write_corpus(folder), "urls": urls, "out": folder / "out"}


def train_accepts(config: RunConfig) -> bool:
    """Return whether `train` accepts the config and the teachers before its first step."""

    async def connect(student: SampleTokenizer) -> None:
        async with connect_teachers(config.teachers, student, config.data):
            pass

    try:
        asyncio.run(connect(begin(config, Ranks(), resume=False).tokenizer))
    except (UserError, TokenizerError, ValueError):
        return False
    return True


@given(
    window=st.sampled_from([60, MAX_TOKENS - 2, MAX_TOKENS - 1, MAX_TOKENS, MAX_TOKENS + 1]),
    close_documents=st.booleans(),
    student=st.sampled_from(["bos", "no_bos"]),
    teacher_has_eos=st.booleans(),
    lora=st.booleans(),
    tracker=st.sampled_from([None, "tensorboard", "wandb", "mlflow"]),
    absent=st.sets(st.sampled_from(ABSENT)),
    device=st.sampled_from(["cpu", "cuda"]),
    train_layers=st.sampled_from([None, 2, 3]),
    batch_samples=st.sampled_from([4, 64]),
    out_is_file=st.booleans(),
)
@example(
    window=60,
    close_documents=True,
    student="bos",
    teacher_has_eos=False,
    lora=False,
    tracker=None,
    absent=set(),
    device="cpu",
    train_layers=None,
    batch_samples=4,
    out_is_file=False,
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_doctor_accepts_what_train_accepts(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **case: Any) -> None:
    def find_unless_absent(name: str) -> object:
        return None if name in case["absent"] else find_spec(name)

    tracking = {} if case["tracker"] is None else {case["tracker"]: case["tracker"] == "tensorboard" or "project"}
    student = {"device": case["device"], "train_layers": case["train_layers"]}
    if case["lora"] and case["train_layers"] is None:
        student["lora"] = {"rank": 2}
    out = setup["out"].with_name("file" if case["out_is_file"] else "out")
    if case["out_is_file"]:
        out.write_text("", encoding="utf-8")
    config = run_config(
        setup["students"][case["student"]],
        setup["corpus"],
        out,
        [setup["urls"][case["teacher_has_eos"]]],
        student=student,
        data={"window_tokens": case["window"], "close_documents": case["close_documents"], "too_long": "shorten"},
        train={"batch_samples": case["batch_samples"], "epochs": 1},
        tracking=tracking,
    )
    with monkeypatch.context() as patch:
        patch.setattr("trainer.training.start_checks.find_spec", find_unless_absent)
        patch.setattr("trainer.telemetry.tracking.find_spec", find_unless_absent)
        findings = examine(config)
        assert all(finding.ok for finding in findings) == train_accepts(config), findings


@pytest.mark.parametrize(("kind", "close", "longest"), [("bos", True, 510), ("bos", False, 511), ("no_bos", True, 511)])
def test_a_window_counts_bos_and_eos(
    setup: dict[str, Any], tmp_path: Path, kind: str, close: bool, longest: int
) -> None:
    def findings(window: int) -> list[str]:
        data = {"window_tokens": window, "close_documents": close}
        config = run_config(
            setup["students"][kind], setup["corpus"], tmp_path / "out", [setup["urls"][True]], data=data
        )
        return [finding.detail for finding in examine(config) if not finding.ok and finding.subject == "student"]

    assert findings(longest) == []
    (detail,) = findings(longest + 1)
    assert f"data.window_tokens is {longest + 1} (513 with " in detail
    assert "the student takes 512 tokens" in detail
