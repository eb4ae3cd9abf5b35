"""vLLM processes on loopback: an OpenAI server with the plugin, `tutelage serve`, and `tutelage serve --rollouts`."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.serve import free_port

KEY = "a-key-for-tests"
START_S = 240.0
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": str(min(os.cpu_count() or 1, 8)),
}


@contextmanager
def vllm_openai_server(model: Path, max_top_k: int, max_tokens: int, batch_tokens: int = 2048) -> Iterator[str]:
    """Run an unmodified vLLM OpenAI server with the plugin and the key KEY. Yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", model.name, "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-logprobs", str(max_top_k), "--max-model-len", str(max_tokens + 1)]
    command += ["--max-num-batched-tokens", str(batch_tokens), "--no-enable-prefix-caching"]
    with started(command, port, VLLM_PLUGINS="tutelage", VLLM_API_KEY=KEY):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def rollout_server(model: Path, sync_dir: Path, max_tokens: int) -> Iterator[str]:
    """Run `tutelage serve --rollouts` in bfloat16 with one thread and the key KEY. Yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "trainer.cli", "serve", str(model), "--rollouts", "--sync-dir", str(sync_dir)]
    command += ["--port", str(port), "--dtype", "bfloat16", "--max-tokens", str(max_tokens), "--max-top-k", "17"]
    command += ["--vllm-args", '{"enforce_eager": true}']
    with started(command, port, path="/health", TUTELAGE_KEY=KEY, OMP_NUM_THREADS="1"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def started(command: Sequence[str], port: int, path: str = "/ready", **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process and wait until `path` responds with 200. It and its children are ended after the block."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=os.environ | ENV | env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_S
            while not _is_ready(port, path):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise AssertionError(f"the process is not ready: {output.read()[-4000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_ready(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    children = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(n for child in children for n in descendants(child))]
