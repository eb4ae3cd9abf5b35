"""Teachers on a real local Ray Serve: two models, two replicas each, through the proxy and by handle."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
import yaml

import teachers.protocol.errors as errors
from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.base import ReplicaClient
from teachers.client.dialects.native import NativeClient
from teachers.client.pool import TeacherPool
from teachers.engines.transformers import TransformersEngine
from teachers.engines.transformers_options import TransformersOptions
from teachers.protocol.messages import ScoreRequest
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from teachers.server.ray_options import RayServeOptions
from tests.serve import free_port, until
from tests.test_processes import TUTELAGE, wait_for

if importlib.util.find_spec("ray") is None:
    if os.environ.get("CI"):
        raise ImportError("ray is not installed, and CI is set")
    pytest.skip("ray is not installed: install the extra ray", allow_module_level=True)

with warnings.catch_warnings():
    warnings.filterwarnings(
        "ignore", "Using extra keyword arguments on `Field`", DeprecationWarning
    )  # in Ray's schemas
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

from teachers.client.dialects.ray_handle import RayHandleClient
from teachers.server.ray_serve import bind
from tests.ray_commands import is_ready, printed, run_file, started
from tests.ray_engines import events, watched

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START_S = 240.0
FLOAT32 = TransformersOptions(dtype="float32")
TOP_K = 16


@pytest.fixture(scope="module")
def cluster(tiny_byte_level: Path, tiny_sentencepiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a small Ray of its own, where the tiny models are names in the cache; no process outlives it."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").mkdir()
    for folder in (tiny_byte_level, tiny_sentencepiece):
        (cache / "models" / folder.name).symlink_to(folder)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTELAGE_CACHE", str(cache))
        ray.init("local", num_cpus=8, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive


@pytest.fixture(scope="module")
def address(
    cluster: str, tiny_byte_level: Path, tiny_sentencepiece: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of what `serve run` makes of two tiny teachers of two replicas each."""
    folder, port, names = tmp_path_factory.mktemp("serve"), free_port(), [tiny_byte_level.name, tiny_sentencepiece.name]
    (folder / "serve.yaml").write_text(printed(run_file(folder, names, port, replicas=2), port), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("serve")), "run", str(folder / "serve.yaml")]
    with started(command, os.environ | {"RAY_ADDRESS": cluster}) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: all(is_ready(process, f"{url}/{name}") for name in names), START_S, "both teachers")
        wait_for(lambda: all(len(replicas_of(name)) == 2 for name in names), START_S, "two replicas each")
        yield url


def replicas_of(name: str) -> list[int]:
    """The processes of an application's replicas, by the title that Ray gives them."""
    below = psutil.Process().children(recursive=True)
    return [p.pid for p in below if f"ray::ServeReplica:{name}:teacher" in "".join(p.cmdline())]


def clients(address: str, name: str, key: str | None = None) -> list[ReplicaClient]:
    return [NativeClient(name, f"{address}/{name}", key), RayHandleClient(name, f"serve://{name}", key)]


def each_way(address: str, name: str, do: Callable[[ReplicaClient], Awaitable[None]], key: str | None = None) -> None:
    """Run the same over HTTP and by handle."""

    async def run() -> None:
        for client in clients(address, name, key):
            try:
                await do(client)
            finally:
                await client.aclose()

    asyncio.run(run())


def make_sequences(count: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, vocab_size, size=rng.integers(2, 200)).tolist() for _ in range(count)]


def expected_rows(folder: Path, sequences: Sequence[list[int]]) -> list[Rows]:
    """Return the rows of an engine in this process, as a client would receive them."""

    async def run(engine: TransformersEngine) -> list[Rows]:
        rows = await asyncio.gather(*(engine.score(s, 1, TOP_K) for s in sequences))
        return [as_received(r, s, engine.card) for r, s in zip(rows, sequences, strict=True)]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray sets it for less than two CPUs; more threads sum in another order
    engine = TransformersEngine(folder, FLOAT32)
    try:
        return asyncio.run(run(engine))
    finally:
        engine.close()
        torch.set_num_threads(num_threads)


def assert_equal(received: Sequence[Rows], expected: Sequence[Rows]) -> None:
    for ours, theirs in zip(received, expected, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
        np.testing.assert_array_equal(ours.actual, theirs.actual)
        np.testing.assert_array_equal(ours.tail, theirs.tail)


def test_two_teachers_under_one_address_return_the_rows_of_local_engines(
    address: str, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    async def score(name: str, sequences: Sequence[list[int]]) -> list[Rows]:
        async with TeacherPool([TeacherAddress(name, (f"{address}/{name}",))]) as pool:
            await pool.connect(name)
            return await asyncio.gather(*(pool.score(name, s, 1, TOP_K) for s in sequences))

    for folder in (tiny_byte_level, tiny_sentencepiece):
        sequences = make_sequences(30, 300)
        assert_equal(asyncio.run(score(folder.name, sequences)), expected_rows(folder, sequences))


def test_handle_and_proxy_return_the_same(address: str, tiny_byte_level: Path) -> None:
    sequences = make_sequences(12, 300)
    expected = expected_rows(tiny_byte_level, sequences)

    async def score(client: ReplicaClient) -> None:
        card = await client.card()
        await client.ping(10.0)
        await client.check(card, 10.0)
        files = await client.tokenizer_files(card)
        assert files["tokenizer.json"] == (tiny_byte_level / "tokenizer.json").read_bytes()
        request = ScoreRequest(sequences=sequences, starts=[1] * len(sequences), top_k=TOP_K)
        assert_equal(await client.score(request, card, 30.0), expected)
        with pytest.raises(errors.Rejected, match="teacher byte_level at .* top_k is 900"):
            await client.score(ScoreRequest(sequences=[[1, 2]], starts=[1], top_k=900), card, 30.0)

    each_way(address, "byte_level", score)


def test_an_unknown_application_is_a_teacher_error(address: str) -> None:
    async def score(client: ReplicaClient) -> None:
        with pytest.raises(errors.Unavailable, match="teacher nobody at"):
            await client.card()

    each_way(address, "nobody", score)
    for url in ("serve://", "http://one", "serve://a/b"):
        with pytest.raises(errors.TeacherError, match="expected serve://APPLICATION"):
            RayHandleClient("one", url)


RAY_ERRORS = [
    kind
    for kind in {**vars(ray.exceptions), **vars(ray.serve.exceptions)}.values()
    if isinstance(kind, type) and issubclass(kind, (ray.exceptions.RayError, ray.serve.exceptions.RayServeException))
]


@pytest.mark.parametrize("kind", [*RAY_ERRORS, asyncio.CancelledError], ids=lambda kind: kind.__name__)
def test_every_error_of_ray_is_mapped(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(kind):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            BaseException.__init__(self, "from Ray")

        __str__ = BaseException.__str__
        retry_after_s = 3.0

    def fail(_: str) -> None:
        raise Failing

    async def score() -> None:
        client = RayHandleClient("gemma", "serve://gemma")
        try:
            await client.card()
        finally:
            await client.aclose()

    monkeypatch.setattr("teachers.client.dialects.ray_handle._get_handle", fail)
    with pytest.raises(errors.Unavailable, match="teacher gemma at serve://gemma: ") as caught:
        asyncio.run(score())
    assert isinstance(caught.value, errors.Overloaded) == (kind is ray.serve.exceptions.BackPressureError)


def test_a_killed_replica_loses_no_sample(address: str, tiny_sentencepiece: Path) -> None:
    name, sequences = tiny_sentencepiece.name, make_sequences(400, 300)
    killed: list[int] = []

    async def score() -> list[Rows]:
        done = 0

        async def one(sequence: list[int]) -> Rows:
            nonlocal done
            rows = await pool.score(name, sequence, 1, TOP_K)
            done += 1
            if done == 60:
                killed.extend(replicas_of(name)[:1])
                os.kill(killed[0], signal.SIGKILL)
            return rows

        async with TeacherPool([TeacherAddress(name, (f"{address}/{name}",), concurrency=16)]) as pool:
            await pool.connect(name)
            return await asyncio.gather(*map(one, sequences))

    assert len(replicas_of(name)) == 2
    assert_equal(asyncio.run(score()), expected_rows(tiny_sentencepiece, sequences))
    assert len(killed) == 1
    assert not psutil.pid_exists(killed[0])


@pytest.fixture
def slow(address: str, tiny_byte_level: Path, tmp_path: Path) -> Iterator[Path]:
    """Run a teacher "slow" with one replica and a key. Yields the folder of its events."""
    (tmp_path / "key").write_text("right", encoding="utf-8")
    options = RayServeOptions(
        model=str(tiny_byte_level),
        cpus=0.1,
        max_ongoing_requests=1,
        max_queued_requests=2,
        retry_after_s=7,
        health_check_period_s=0.2,
        key_file=str(tmp_path / "key"),
    )
    serve.run(bind(options, watched(tmp_path)), name="slow", route_prefix="/slow")
    yield tmp_path
    serve.delete("slow")


def test_keys_queue_cancellation_health_and_drain_of_a_slow_teacher(address: str, slow: Path) -> None:
    """All checks that need a slow engine share one start of it."""
    each_way(address, "slow", a_missing_key_is_rejected)
    each_way(address, "slow", a_full_queue_is_overloaded, key="right")
    each_way(address, "slow", lambda c: work_is_cancelled_when_the_client_disconnects(c, slow), key="right")
    (broken,) = set(events(slow, "opened"))
    (slow / str(broken)).touch()
    wait_for(lambda: len(events(slow, "opened")) == 2, START_S, "a replica in place of the broken one")
    wait_for(lambda: not psutil.pid_exists(broken), START_S, "the end of the broken replica")
    asyncio.run(a_removed_replica_finishes_its_request(address, slow))
    assert events(slow, "closed") == events(slow, "opened")


def in_flight(folder: Path) -> int:
    """Return the number of sequences in the engine, which finishes none before the file "go" exists."""
    return len(events(folder, "started")) - len(events(folder, "cancelled"))


async def a_removed_replica_finishes_its_request(address: str, folder: Path) -> None:
    client = NativeClient("slow", f"{address}/slow", "right")
    request = ScoreRequest(sequences=[[1, 2]], starts=[1], top_k=4)
    try:
        response = asyncio.create_task(client.score(request, await client.card(), 60.0))
        await until(lambda: in_flight(folder) == 1, 60)
        leaving = asyncio.create_task(asyncio.to_thread(serve.delete, "slow"))
        await until(lambda: serve.status().applications["slow"].status == "DELETING", 60)
        (folder / "go").touch()
        assert len(await response) == 1
        await leaving
    finally:
        await client.aclose()


async def a_missing_key_is_rejected(client: ReplicaClient) -> None:
    with pytest.raises(errors.Unauthorized, match="teacher slow at"):
        await client.card()
    await client.ping(10.0)


async def a_full_queue_is_overloaded(client: ReplicaClient) -> None:
    card = await client.card()
    refused = 0
    request = ScoreRequest(sequences=[[1, 2]], starts=[1], top_k=4)
    jobs = [asyncio.create_task(client.score(request, card, 60.0)) for _ in range(12)]
    try:
        for job in asyncio.as_completed(jobs):
            with pytest.raises(errors.Overloaded, match="teacher slow at") as caught:
                await job
            assert caught.value.retry_after_s == 7.0
            refused += 1
            if refused == 6:  # one runs and two wait; a replica may return further requests to the queue
                break
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def work_is_cancelled_when_the_client_disconnects(client: ReplicaClient, folder: Path) -> None:
    card = await client.card()
    await until(lambda: in_flight(folder) == 0, 60)
    request = ScoreRequest(sequences=[[1, 2], [3, 4, 5]], starts=[1, 1], top_k=4)
    pending = asyncio.create_task(client.score(request, card, 60.0))
    await until(lambda: in_flight(folder) == 2, 60)
    pending.cancel()
    await until(lambda: in_flight(folder) == 0, 60)
    with pytest.raises(errors.Unavailable, match="no complete response within 0.5 s"):
        await client.score(request, card, 0.5)


def test_serve_ray_joins_a_cluster_and_removes_only_its_own_applications(
    cluster: str, address: str, tmp_path: Path, tiny_byte_level: Path
) -> None:
    """A second user with the same name is rejected, and replaces the application only with --replace."""
    port = int(address.rpartition(":")[2])
    run = run_file(tmp_path, ["third"], port, replicas=1)
    run.write_text(run.read_text(encoding="utf-8").replace('model = "third"', f'model = "{tiny_byte_level}"'), "utf-8")
    command = [*TUTELAGE, "serve-ray", str(run), "--port", str(port), "--address", cluster]
    with started(command, os.environ) as first:
        wait_for(lambda: is_ready(first, f"{address}/third"), START_S, "the third teacher")
        rejected = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
        assert rejected.returncode == 1
        assert rejected.stderr.splitlines()[-1].startswith("error: the Ray cluster already serves third: rename the")
        (deployment,) = serve.status().applications["third"].deployments
        with started([*command, "--replace"], os.environ) as second:
            wait_for(lambda: deployment not in serve.status().applications["third"].deployments, START_S, "another one")
            assert first.wait(timeout=START_S) == 1  # nothing is left to serve
            wait_for(lambda: is_ready(second, f"{address}/third"), START_S, "the replacement")
    assert second.returncode == 130
    assert httpx.get(f"{address}/third/ready").status_code == 404
    assert httpx.get(f"{address}/{tiny_byte_level.name}/ready").status_code == 200


def test_the_yaml_in_deploy_is_the_output_of_serve_ray_print() -> None:
    written = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    assert written == yaml.safe_load(printed(ROOT / "recipes" / "ray.toml", 8000))
    applications = ServeDeploySchema.model_validate(written).applications
    assert [a.route_prefix for a in applications] == ["/smollm2", "/gemma"]
    for served in applications:
        RayServeOptions.model_validate(served.args)
