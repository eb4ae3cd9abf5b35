"""`tutelage serve`: options, and commands that users confuse with it."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trainer.cli.__main__ import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-top-k", "-5"], "--max-top-k: Input should be greater than or equal to 1, received -5"),
        (["--max-top-k", "0"], "--max-top-k: Input should be greater than or equal to 1, received 0"),
        (["--max-tokens", "0"], "--max-tokens: Input should be greater than or equal to 2, received 0"),
        (["--max-tokens", "1"], "--max-tokens: Input should be greater than or equal to 2, received 1"),
        (["--batch-tokens", "-1"], "--batch-tokens: Input should be greater than or equal to 0, received -1"),
        (["--device", ""], "--device: String should have at least 1 character"),
        (["--tensor-parallel", "2"], "--tensor-parallel: unknown option, expected one of dtype, bos,"),
        (["--vllm-args", "{}"], "--vllm-args: unknown option, expected one of dtype, bos,"),
        (["--engine", "vllm", "--tensor-parallel", "0"], "--tensor-parallel: Input should be greater than or equal to"),
        (["--engine", "vllm", "--device", "cuda"], "--device: unknown option, expected one of dtype, bos,"),
        (["--engine", "vllm", "--batch-tokens", "512"], "--batch-tokens: unknown option, expected one of"),
        (["--engine", "vlm"], "--engine: expected one of transformers, vllm, received 'vlm'"),
    ],
)
def test_invalid_engine_options_are_one_sentence(arguments: list[str], message: str) -> None:
    result = run("serve", "nowhere", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1


def test_a_run_file_is_no_model_and_the_message_names_serve_ray(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("", encoding="utf-8")
    for path in (str(tmp_path / "run.toml"), "nowhere/run.toml"):
        result = run("serve", path)
        assert result.exit_code == 1
        assert f"`tutelage serve-ray {path}`" in result.output
        assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["model"], ["model", "--port", "8101", "--dtype=float32"]])
def test_teach_names_the_command_that_serves_a_model(arguments: list[str]) -> None:
    result = run("teach", *arguments)
    assert result.exit_code == 1
    assert "use `tutelage serve MODEL`" in result.output
    assert "│ teach" not in run("--help").output
