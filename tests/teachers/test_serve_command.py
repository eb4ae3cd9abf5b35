"""`tutelage serve`: options, and commands that users confuse with it."""

import asyncio
import json
import shutil
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from teachers.engines.vllm_options import VllmOptions
from teachers.protocol.errors import TeacherError
from teachers.server.rollout_options import (
    RolloutServerOptions,
    check_rollout_server,
    check_variables,
    checked_sync_dir,
    vllm_arguments,
)
from teachers.server.vllm_plugin import TutelagePlugin
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
        (["--rollouts", "--sync-dir", ".", "--bos", "yes"], "--bos is not an option of --rollouts"),
        (["--rollouts", "--sync-dir", ".", "--device", "cuda"], "--device: unknown option"),
        (["--rollouts", "--sync-dir", "."], "nowhere"),
        (["--rollouts", "--sync-dir", ".", "--engine", "vllm"], "nowhere"),
        *(
            (["--rollouts", "--sync-dir", ".", *option], f"{option[0]} has no effect with --rollouts")
            for option in (
                ["--engine", "transformers"],
                ["--max-body-bytes", "9"],
                ["--max-seconds", "600"],
                ["--request-log"],
                ["--stop-with-parent"],
                ["--max-sequences", "1"],
                ["--max-request-tokens", "9"],
                ["--max-queued-tokens", "9"],
                ["--drain-s", "1"],
            )
        ),
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
        ("one", "~no-such-user/x", "--sync-dir ~no-such-user/x cannot be read"),
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


@pytest.mark.parametrize(
    "name",
    [
        "model", "host", "port", "api_key", "api-key", "enable_prefix_caching", "no-enable-prefix-caching",
        "worker_extension_cls", "worker-ext", "generation_config", "logprobs_mode", "max_logprobs", "max_model_len",
        "tensor_parallel_size", "dtype", "served_model_name", "ssl_keyfile", "enable_lora", "quantization",
        "data_parallel_size", "api_server_count", "config", "--port",
    ],
)  # fmt: skip
def test_vllm_args_that_the_command_sets_are_refused(tiny_byte_level: Path, name: str) -> None:
    options = RolloutServerOptions(VllmOptions(dtype="float32", vllm_args={name: "x"}), Path("/sync"))
    with pytest.raises(TeacherError, match=rf"--vllm-args: {name} is set by the command, or not possible"):
        vllm_arguments(tiny_byte_level, options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_SERVER_DEV_MODE", "1"), ("VLLM_SERVER_DEV_MODE", "2"), ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", " True"),
    ],
)  # fmt: skip
def test_variables_that_open_routes_to_the_weights_are_refused(
    tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    check_variables()
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUTELAGE_KEY", "one")
    result = run("serve", str(tiny_byte_level), "--rollouts", "--sync-dir", ".")
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert f"does not start with {name}" in result.output
    with pytest.raises(TeacherError, match=name):
        check_server(CONFIG)
    monkeypatch.setenv(name, "0")
    check_server(CONFIG)


def test_a_quantized_model_is_no_model_of_a_rollout_server(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_byte_level, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    monkeypatch.setenv("TUTELAGE_KEY", "one")
    result = run("serve", str(model), "--rollouts", "--sync-dir", ".")
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert "its weights are quantized (awq)" in result.output


def test_the_sync_dir_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sync").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "sync")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    for path in ("sync", "sync/../sync", "link", "../" + tmp_path.name + "/sync"):
        assert checked_sync_dir(Path(path)) == (tmp_path / "sync").resolve()
    with pytest.raises(TeacherError, match="--sync-dir loop cannot be read"):
        checked_sync_dir(Path("loop"))


def test_an_existing_server_does_not_start_without_its_sync_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_SYNC_DIR", str(tmp_path / "nothing"))
    client = SimpleNamespace(vllm_config=None)
    with pytest.raises(TeacherError, match=r"--sync-dir .*/nothing is not a directory"):
        asyncio.run(TutelagePlugin().init_state(client, None, Namespace()))


CONFIG = {
    "model_config.logprobs_mode": "raw_logprobs",
    "model_config.generation_config": "vllm",
    "model_config.max_logprobs": 17,
    "model_config.model": ".",
    "model_config.quantization": None,
    "config.lora_config": None,
    "parallel_config.worker_extension_cls": "teachers.engines.rollout_worker.RolloutWorker",
    "parallel_config.data_parallel_size": 1,
    "args.api_key": ["key"],
    "args.api_server_count": 1,
}


def check_server(values: dict[str, Any]) -> None:
    names = ("model_config", "parallel_config", "config", "args")
    sections: dict[str, Any] = {name: SimpleNamespace() for name in names}
    for key, value in values.items():
        section, _, name = key.partition(".")
        setattr(sections[section], name, value)
    args, config = sections.pop("args"), sections.pop("config")
    check_rollout_server(SimpleNamespace(**sections, **vars(config)), args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config.logprobs_mode": "processed_logprobs"}, "needs --logprobs-mode raw_logprobs"),
        ({"model_config.generation_config": "auto"}, "needs --generation-config vllm, received 'auto'"),
        ({"model_config.max_logprobs": 16}, "needs --max-logprobs 17, received 16"),
        ({"model_config.quantization": "awq"}, "needs weights without quantization, received awq"),
        ({"config.lora_config": object()}, "does not start with --enable-lora"),
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
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    check_server(CONFIG)
    check_server(CONFIG | {"model_config.max_logprobs": -1})
    with pytest.raises(TeacherError, match=message):
        check_server(CONFIG | change)
