"""Runs and `doctor` with teachers on stock servers, compared with the native server of the same engine."""

from pathlib import Path
from typing import Any

import pytest

from teachers.protocol.rows import Rows
from tests.fake_echo import GENERATED
from tests.serve import FormulaEngine, serving
from tests.stock_servers import STOCK_SERVERS
from tests.trainer.runs import losses, run_config, write_corpus
from trainer.cli.run_checks import examine
from trainer.config import RunConfig
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train


def short_run(folder: Path, student: Path, url: str, **options: object) -> RunConfig:
    """Build a run of two steps with one teacher."""
    sections: dict[str, Any] = {
        "data": {"sources": [{"files": [str(write_corpus(folder))]}], "window_tokens": 40, "max_samples": 4},
        "train": {"epochs": 1, "batch_samples": 2},
        "eval": {"held_out_documents": 1, "max_samples": 1},
    }
    config = run_config(student, folder / "corpus.jsonl", folder / "out", [url], **sections)
    return config.model_copy(update={"teachers": [config.teachers[0].model_copy(update=options)]})


class WithGeneratedToken(FormulaEngine):
    """Return the rows of a sequence with one more token, as an OpenAI-compatible endpoint computes them."""

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        rows = await super().score([*sequence, GENERATED], start, top_k)
        return Rows(start, rows.ids[:-1], rows.logprobs[:-1], rows.actual[:-1], rows.tail[:-1])


@pytest.mark.parametrize("name", STOCK_SERVERS)
def test_a_run_has_the_losses_of_the_native_server(
    name: str, tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    (tmp_path / "native").mkdir()
    engine_type = WithGeneratedToken if name == "openai_echo" else FormulaEngine
    with serving(engine_type(tiny_byte_level)) as url:
        train(short_run(tmp_path / "native", tiny_sentencepiece, url))
    with STOCK_SERVERS[name](FormulaEngine(tiny_byte_level)).serving() as url:
        train(short_run(tmp_path, tiny_sentencepiece, url, tokenizer=str(tiny_byte_level)))
    expected = losses(tmp_path / "native" / "out")
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=2e-3)  # float16; other rows differ by 7e-3
    for step in [event for event in read_metrics(tmp_path / "out" / "metrics.jsonl") if event["event"] == "step"]:
        assert step["coverage"] > 0.9
        assert step["teachers"]["t0"]["masked"] == 0


@pytest.mark.parametrize("name", STOCK_SERVERS)
def test_doctor_accepts_a_stock_server_and_reports_its_cost(
    name: str, tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    server = STOCK_SERVERS[name](FormulaEngine(tiny_byte_level))
    with server.serving() as url:
        findings = examine(short_run(tmp_path, tiny_sentencepiece, url, tokenizer=str(tiny_byte_level)))
    assert all(finding.ok for finding in findings), findings
    kind = server.client_type.kind
    details = [finding.detail for finding in findings if finding.subject == "teacher t0"]
    assert details[0].startswith(f"{'smol' if name == 'openai_echo' else 'org/model'} on ")
    assert details[1] == f"{kind.name}: {kind.cost}"


def test_doctor_reports_no_cost_of_a_native_server(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        findings = examine(short_run(tmp_path, tiny_sentencepiece, url))
    details = [finding.detail for finding in findings if finding.subject == "teacher t0"]
    assert details[0].startswith("byte_level on formula, ")
    assert details[1].startswith("the tokenizer of ")
