"""`tutelage serve`: options, and commands that users confuse with it."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from teachers.engines.vllm_options import VllmOptions
from teachers.protocol.errors import TeacherError
from teachers.server.rollout_options import RolloutServerOptions, check_rollout_server, vllm_arguments
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


# --- rollout servers ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollouts"], "--rollouts needs --sync-dir"),
        (["--sync-dir", "."], "--sync-dir is an option of --rollouts"),
        (["--rollouts", "--sync-dir", ".", "--bos", "yes"], "--bos is no option of --rollouts"),
        (["--rollouts", "--sync-dir", ".", "--device", "cuda"], "--device: unknown option"),
        (["--rollouts", "--sync-dir", "."], "nowhere"),
    ],
)
def test_invalid_options_of_rollout_servers_are_one_sentence(arguments: list[str], message: str) -> None:
    result = run("serve", "nowhere", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("keys", "sync_dir", "message"),
    [
        (None, ".", "TUTELAGE_KEY is not set"),
        ("one two", ".", "a rollout server accepts one key, received 2"),
        ("one", "nothing", "--sync-dir nothing is not a directory"),
    ],
)
def test_a_rollout_server_needs_one_key_and_a_directory(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, keys: str | None, sync_dir: str, message: str
) -> None:
    monkeypatch.delenv("TUTELAGE_KEY", raising=False)
    if keys is not None:
        monkeypatch.setenv("TUTELAGE_KEY", keys)
    result = run("serve", str(tiny_byte_level), "--rollouts", "--sync-dir", sync_dir)
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert message in result.output


def test_arguments_of_a_rollout_server_and_those_of_vllm_args_become_flags(tiny_byte_level: Path) -> None:
    engine = VllmOptions(
        max_tokens=400, dtype="float32", vllm_args={"enforce_eager": True, "hf_overrides": {"a": 1}, "seed": 0}
    )
    flags = vllm_arguments(tiny_byte_level, RolloutServerOptions(engine, Path("/sync"), port=8102))
    pairs = dict(pairwise(flags))
    expected = {
        "--model": str(tiny_byte_level), "--max-model-len": "400", "--dtype": "float32", "--port": "8102",
        "--logprobs-mode": "raw_logprobs", "--generation-config": "vllm", "--max-logprobs": "128",
        "--worker-extension-cls": "teachers.engines.rollout_worker.RolloutWorker", "--hf-overrides": '{"a": 1}',
        "--seed": "0",
    }  # fmt: skip
    assert pairs.items() >= expected.items()
    assert {"--enforce-eager", "--enable-prefix-caching"} <= set(flags)
    assert "--ssl-certfile" not in flags
    assert "True" not in flags


CONFIG = {
    "model_config.logprobs_mode": "raw_logprobs",
    "model_config.generation_config": "vllm",
    "model_config.max_logprobs": 17,
    "model_config.model": ".",
    "parallel_config.worker_extension_cls": "teachers.engines.rollout_worker.RolloutWorker",
    "parallel_config.data_parallel_size": 1,
    "args.api_key": ["key"],
    "args.api_server_count": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config.logprobs_mode": "processed_logprobs"}, "needs --logprobs-mode raw_logprobs"),
        ({"model_config.generation_config": "auto"}, "needs --generation-config vllm, received 'auto'"),
        ({"model_config.max_logprobs": 16}, "needs --max-logprobs 17, received 16"),
        ({"model_config.model": "org/name"}, "needs a model directory, received the name org/name"),
        ({"parallel_config.worker_extension_cls": ""}, "needs --worker-extension-cls teachers"),
        ({"parallel_config.data_parallel_size": 2}, "needs --data-parallel-size 1, received 2"),
        ({"args.api_server_count": 2}, "needs --api-server-count 1"),
        ({"args.api_key": None}, "needs --api-key"),
    ],
)
def test_a_vllm_server_that_cannot_write_rollouts_is_refused_with_the_argument_to_change(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    def check(values: dict[str, Any]) -> None:
        sections: dict[str, Any] = {name: SimpleNamespace() for name in ("model_config", "parallel_config", "args")}
        for key, value in values.items():
            section, _, name = key.partition(".")
            setattr(sections[section], name, value)
        config = SimpleNamespace(model_config=sections["model_config"], parallel_config=sections["parallel_config"])
        check_rollout_server(config, sections["args"])

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    check(CONFIG)
    check(CONFIG | {"model_config.max_logprobs": -1})
    with pytest.raises(TeacherError, match=message):
        check(CONFIG | change)
