"""docker-compose.yml: the output of `docker-compose config`, and the commands of the services as local processes.

No container is built. Only addresses, ports, secrets and volumes are replaced by those of local processes.
"""

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import TEXT, save_tiny_model
from trainer.run_file import load_config
from trainer.telemetry.jsonl import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PORTS = {"smollm2": 8101, "gemma": 8102}
RECIPE = ROOT / "recipes" / "compose.toml"
START_S, STEP_S, STOP_S = 240.0, 0.5, 60.0
Service = dict[str, Any]


def read_compose(*files: str) -> dict[str, Any]:
    if shutil.which("docker-compose") is None:
        reason = "docker-compose is not installed"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = [option for file in files for option in ("--file", file)]
    done = subprocess.run(["docker-compose", *options, "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = yaml.safe_load(done.stdout)
    return parsed


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read_compose("docker-compose.yml")


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Service]:
    parsed: dict[str, Service] = compose["services"]
    return parsed


def words(command: str | list[str]) -> list[str]:
    """Return the words of a command, which docker-compose 1.29 prints as one string and later versions as a list."""
    return shlex.split(command) if isinstance(command, str) else command


# --- the configuration that docker-compose reads ---


def test_the_file_is_valid_and_has_four_services(services: dict[str, Service]) -> None:
    assert set(services) == {"prepare", "smollm2", "gemma", "trainer"}


def test_teachers_start_after_preparation_and_training_after_the_teachers(services: dict[str, Service]) -> None:
    def conditions(name: str) -> dict[str, str]:
        return {other: dependency["condition"] for other, dependency in services[name].get("depends_on", {}).items()}

    assert conditions("prepare") == {}
    for teacher in PORTS:
        assert conditions(teacher) == {"prepare": "service_completed_successfully"}
    assert conditions("trainer") == dict.fromkeys(PORTS, "service_healthy")


def test_all_services_use_one_image_and_one_service_builds_it(services: dict[str, Service]) -> None:
    assert {service["image"] for service in services.values()} == {"tutelage"}
    assert [name for name, service in services.items() if "build" in service] == ["prepare"]


def test_only_preparation_has_internet_access_and_no_port_is_published(
    compose: dict[str, Any], services: dict[str, Service]
) -> None:
    internal = {name for name, network in compose["networks"].items() if network.get("internal")}
    assert set(services["prepare"]["networks"]).isdisjoint(internal)
    for name in (*PORTS, "trainer"):
        assert set(services[name]["networks"]) == internal == {"teaching"}
    assert all("ports" not in service and "network_mode" not in service for service in services.values())


def test_each_key_is_a_secret_of_its_teacher_and_the_trainer_only(
    compose: dict[str, Any], services: dict[str, Service]
) -> None:
    def secrets_of(name: str) -> set[str]:
        return {secret["source"] for secret in services[name].get("secrets", [])}

    keys = {name: f"{name}.key" for name in PORTS}
    assert {teacher: secrets_of(teacher) for teacher in PORTS} == {teacher: {key} for teacher, key in keys.items()}
    assert secrets_of("trainer") == set(keys.values())
    assert secrets_of("prepare") == set()
    for key in keys.values():
        assert Path(compose["secrets"][key]["file"]) == ROOT / "deploy" / "secrets" / key


def test_git_ignores_the_keys() -> None:
    for name in PORTS:
        path = f"deploy/secrets/{name}.key"
        done = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, timeout=60)
        assert done.returncode == 0, f"git does not ignore {path}"


def test_services_restart_and_have_a_grace_period(services: dict[str, Service]) -> None:
    assert {name: services[name].get("restart") for name in services} == {
        "prepare": None,
        "smollm2": "unless-stopped",
        "gemma": "unless-stopped",
        "trainer": "on-failure:5",
    }
    assert all(service["init"] is True and service["cap_drop"] == ["ALL"] for service in services.values())
    assert all(services[name]["stop_grace_period"] == "20s" for name in (*PORTS, "trainer"))


def test_teachers_mount_the_cache_read_only(services: dict[str, Service]) -> None:
    def cache_modes(name: str) -> list[str]:
        volumes = [v if isinstance(v, str) else _short(v) for v in services[name]["volumes"]]
        return [volume.removeprefix("cache:/cache:") for volume in volumes if volume.startswith("cache:")]

    assert all(cache_modes(name) == ["ro"] for name in PORTS)
    assert all(cache_modes(name) == ["rw"] for name in ("prepare", "trainer"))  # the trainer writes window indexes


def _short(volume: dict[str, Any]) -> str:
    """Return a volume in the short form of older versions of compose."""
    return f"{volume['source']}:{volume['target']}:{'ro' if volume.get('read_only') else 'rw'}"


def test_the_gpu_file_assigns_gpus_and_starts_a_process_per_gpu_of_the_student(
    services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_GPUS", "2,3")
    merged = read_compose("docker-compose.yml", "deploy/compose.gpu.yml")["services"]
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "gpu", "-m", "trainer.cli"]
    commands = {name: words(services[name]["command"]) for name in (*PORTS, "trainer")}
    expected = {name: [*commands[name], "--device", "cuda"] for name in PORTS}
    expected["trainer"] = [*launcher, *commands["trainer"][1:], "--set", "student.device=cuda"]
    for name, command in expected.items():
        [gpus] = merged[name]["deploy"]["resources"]["reservations"]["devices"]
        assert gpus["capabilities"] == ["gpu"]
        assert words(merged[name]["command"]) == command
        assert merged[name]["environment"]["CUDA_VISIBLE_DEVICES"] == ("2,3" if name == "trainer" else "0")
    assert merged["trainer"]["shm_size"]


# --- the image and the run file ---


def test_the_image_copies_existing_files_that_dockerignore_includes() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]]
    sources = [word for word in copied if not word.startswith("--")]
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all((ROOT / source).exists() for source in sources)
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == {source.split("/")[0] for source in sources}


def test_the_run_file_differs_from_the_demo_in_addresses_keys_and_output_only() -> None:
    recipe, demo = tomllib.loads(RECIPE.read_text()), tomllib.loads((ROOT / "recipes" / "demo.toml").read_text())
    for teacher, original in zip(recipe["teachers"], demo["teachers"], strict=True):
        name = teacher["name"]
        assert teacher.pop("key_file") == f"/run/secrets/{name}.key"
        assert teacher.pop("urls") == [f"http://{name}:{PORTS[name]}"]
        del original["urls"]
    assert recipe.pop("output")["checkpoint_every_steps"] > 0
    del demo["output"]
    assert recipe == demo


# --- the commands of the services as local processes ---


def on_loopback(command: list[str], replacements: dict[str, str]) -> list[str]:
    """Return a container's command as a local command. Every string to replace must occur in it."""
    programs = {"tutelage": [sys.executable, "-m", "trainer.cli"], "python": [sys.executable]}
    arguments = command[1:]
    for old, new in replacements.items():
        assert any(old in argument for argument in arguments), f"{old} is not in {command}"
        arguments = [argument.replace(old, new) for argument in arguments]
    return [*programs[command[0]], *arguments]


class Teacher:
    """A teacher service as a local process."""

    def __init__(self, name: str, service: Service, folder: Path) -> None:
        self.port = free_port()
        self.key_file = folder / f"{name}.key"
        self.key_file.write_text(secrets.token_hex(32) + "\n", encoding="utf-8")
        port = {str(PORTS[name]): str(self.port)}
        self._command = on_loopback(
            words(service["command"]), port | {"0.0.0.0": "127.0.0.1", "/run/secrets/": f"{self.key_file.parent}/"}
        )
        kind, *test = service["healthcheck"]["test"]
        assert kind == "CMD"
        self._health = on_loopback(test, port)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, cache: Path) -> None:
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=environment(cache), stdin=subprocess.DEVNULL)

    def is_healthy(self) -> bool:
        return subprocess.run(self._health, stderr=subprocess.DEVNULL, timeout=60).returncode == 0

    def await_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.is_healthy():
            assert self._process is not None
            assert self._process.poll() is None, "the teacher process ended; see its error message above"
            assert time.monotonic() < deadline, f"the teacher was not healthy within {START_S:g} s"
            time.sleep(STEP_S)

    def stop(self) -> None:
        """Stop like `docker stop`: SIGTERM, and SIGKILL after the grace period."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"TUTELAGE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache like that of the service `prepare`, with tiny models and little text."""
    folder = tmp_path_factory.mktemp("cache")
    save_tiny_model(folder / "models" / "smollm2-135m-instruct", kind="byte_level", seed=1)
    save_tiny_model(folder / "models" / "gemma-3-270m", kind="sentencepiece", seed=2)
    documents = [TEXT[begin : begin + 200] for begin in range(0, 720, 30)]
    (folder / "data").mkdir()
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "data" / "pydoc-topics.jsonl").write_text(lines, encoding="utf-8")
    return folder


@contextmanager
def running_teachers(
    services: dict[str, Service], names: list[str], cache: Path, folder: Path
) -> Iterator[list[Teacher]]:
    """Run teacher processes within the block. They are healthy at its start and stopped at its end."""
    teachers = [Teacher(name, services[name], folder) for name in names]
    with ExitStack() as stack:
        for teacher in teachers:
            stack.callback(teacher.stop)
            teacher.start(cache)
        for teacher in teachers:
            teacher.await_healthy()
        yield teachers


def test_the_health_check_passes_on_a_ready_teacher_and_fails_on_a_stopped_one(
    services: dict[str, Service], cache: Path, tmp_path: Path
) -> None:
    with running_teachers(services, ["gemma"], cache, tmp_path) as [teacher]:
        assert teacher.is_healthy()
        teacher.stop()
        assert not teacher.is_healthy()


def test_the_trainer_uses_both_teachers_and_resumes_when_started_again(
    services: dict[str, Service], cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    names = [teacher.name for teacher in load_config(RECIPE).teachers]
    overrides = {"output.dir": str(out), "student.train_layers": "1"}
    with running_teachers(services, names, cache, tmp_path) as teachers:
        for i, teacher in enumerate(teachers):
            overrides |= {f"teachers.{i}.urls": f'["{teacher.url}"]', f"teachers.{i}.key_file": str(teacher.key_file)}
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{teacher.url}/v1/teacher", timeout=30)
        command = on_loopback(words(services["trainer"]["command"]), {})
        command += [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
        for stop in (["--stop-at", "7"], [], []):  # interrupted, resumed to the end, and started after the end
            done = subprocess.run(
                command + stop, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, done.stderr
    events = read_metrics(out / "metrics.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 7, len(steps)]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert all(set(step["teachers"]) == set(PORTS) for step in steps)
    assert (out / "model" / "config.json").exists()
