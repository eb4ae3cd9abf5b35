"""One teacher with several replicas: a fault of a replica costs time, and it loses or changes no response."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.base import ReplicaClient
from teachers.client.dialects.native import NativeClient
from teachers.client.events import TeacherEvent
from teachers.client.health import ReplicaHealth
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import FingerprintMismatch, InvalidRows, TeacherLost, Unavailable
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from teachers.server.limits import Limits
from tests.faulty import Fault, FaultyTeacher, faulty_teachers, rows_of
from tests.serve import FormulaEngine, free_port, serving

pytestmark = pytest.mark.slow

NUM_REQUESTS, TOP_K = 150, 16
SEQUENCES = [[1 + n % 200, 2 + n // 200, *range(3, 12 + n % 23)] for n in range(NUM_REQUESTS)]


@pytest.fixture(scope="module")
def replicas(tiny_byte_level: Path) -> Iterator[list[FaultyTeacher]]:
    with faulty_teachers(tiny_byte_level, 3) as teachers:
        yield teachers


@pytest.fixture(autouse=True)
def repaired(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "replicas" in request.fixturenames:
        for teacher in request.getfixturevalue("replicas"):
            if not teacher.running:
                teacher.start()
            teacher.send_signal(signal.SIGCONT)
            teacher.await_ready()
            teacher.set_fault("none")


def address_of(teachers: list[FaultyTeacher], **options: object) -> TeacherAddress:
    return TeacherAddress("t", tuple(t.url for t in teachers), **options)  # type: ignore[arg-type]


def score_all(address: TeacherAddress, inject: Callable[[], None]) -> tuple[list[Rows], dict[str, int]]:
    """Send all requests at once, and inject a fault when a quarter is finished."""

    async def run() -> tuple[list[Rows], dict[str, int]]:
        async with TeacherPool([address]) as pool:
            await pool.connect("t")
            tasks = [asyncio.create_task(pool.score("t", sequence, 1, TOP_K, "x")) for sequence in SEQUENCES]
            while sum(task.done() for task in tasks) < NUM_REQUESTS // 4:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(inject)
            responses = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            return responses, vars(pool.stats()["t"])

    return asyncio.run(run())


def assert_unchanged(responses: list[Rows], vocab_size: int) -> None:
    """Compare bit by bit with the rows of a replica without faults, in the order of the requests."""
    for sequence, response in zip(SEQUENCES, responses, strict=True):
        expected = over_the_wire(sequence, vocab_size)
        for name in ("ids", "logprobs", "actual", "tail"):
            assert (getattr(response, name) == getattr(expected, name)).all(), (sequence, name)


def over_the_wire(sequence: list[int], vocab_size: int) -> Rows:
    from tests.teachers.test_protocol import CARD

    card = CARD.model_copy(update={"vocab_size": vocab_size})
    return as_received(rows_of(sequence, 1, TOP_K, vocab_size), sequence, card)


@pytest.fixture(scope="module")
def vocab_size(tiny_byte_level: Path) -> int:
    return FormulaEngine(tiny_byte_level).card.vocab_size


@pytest.mark.parametrize("fault", ["slow", "cut", "noise", "nan", "unsorted", "foreign", "busy"])
def test_a_faulty_replica_loses_and_changes_no_response(
    replicas: list[FaultyTeacher], vocab_size: int, fault: Fault
) -> None:
    responses, stats = score_all(address_of(replicas), lambda: replicas[1].set_fault(fault))
    assert_unchanged(responses, vocab_size)
    assert stats["requests"] == NUM_REQUESTS
    assert fault == "slow" or stats["retries"] + stats["hedged"] >= 1  # a hedge replaces a rejected response too
    assert (stats["rejected"] > 0) == (fault in ("noise", "nan", "unsorted", "foreign"))


def test_a_killed_replica_loses_no_response(replicas: list[FaultyTeacher], vocab_size: int) -> None:
    responses, stats = score_all(address_of(replicas), replicas[0].kill)
    assert_unchanged(responses, vocab_size)
    assert stats["healthy"] == 2


def test_a_stopped_replica_is_detected_and_its_requests_are_retried(
    replicas: list[FaultyTeacher], vocab_size: int
) -> None:
    """SIGSTOP keeps the connections open without any response. The timeout of a request is a minute."""
    began = time.monotonic()
    responses, _ = score_all(address_of(replicas, timeout_s=60), lambda: replicas[2].send_signal(signal.SIGSTOP))
    assert_unchanged(responses, vocab_size)
    assert time.monotonic() - began < 40


def test_slow_requests_are_hedged_within_the_budget(replicas: list[FaultyTeacher], vocab_size: int) -> None:
    async def run() -> dict[str, int]:
        async with TeacherPool([address_of(replicas, concurrency=2)]) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", s, 1, TOP_K) for s in SEQUENCES))
            await asyncio.to_thread(replicas[0].set_fault, "slow")
            for _ in range(3):
                responses = await asyncio.gather(*(pool.score("t", s, 1, TOP_K) for s in SEQUENCES))
                assert_unchanged(responses, vocab_size)
            return vars(pool.stats()["t"])

    stats = asyncio.run(run())
    assert 1 <= stats["hedged"] <= 0.03 * stats["requests"] + 4


def test_two_invalid_responses_in_a_row_are_raised_with_teacher_and_replica(replicas: list[FaultyTeacher]) -> None:
    async def run() -> None:
        async with TeacherPool([address_of(replicas)]) as pool:
            await pool.connect("t")
            for teacher in replicas:
                await asyncio.to_thread(teacher.set_fault, "nan")
            await asyncio.wait_for(pool.score("t", SEQUENCES[0], 1, TOP_K), 20)

    with pytest.raises(InvalidRows, match=r"teacher t at http://.*sequence 0, position 1: a value that is not finite"):
        asyncio.run(run())


def test_a_request_with_an_invalid_response_is_retried_on_another_replica(tiny_byte_level: Path) -> None:
    """Invalid rows for long texts only, so that the replica passes its trials, and the other one is slow and busy."""
    bad, good = FormulaEngine(tiny_byte_level), FormulaEngine(tiny_byte_level, delay_s=0.6)
    bad.alter = lambda rows: replace(rows, logprobs=rows.logprobs[:, ::-1]) if len(rows) > 10 else rows  # type: ignore[method-assign]

    async def run(urls: tuple[str, ...]) -> int:
        async with TeacherPool([TeacherAddress("t", urls, concurrency=1)]) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", list(range(20)), 1, TOP_K) for _ in range(6)))
            return pool.stats()["t"].rejected

    with serving(bad) as one, serving(good) as two:
        assert asyncio.run(run((one, two))) >= 2


def test_an_invalid_response_is_logged_with_its_sample(
    replicas: list[FaultyTeacher], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "tutelage.pool"):
        score_all(address_of(replicas), lambda: replicas[1].set_fault("unsorted"))
    assert any(
        replicas[1].url in message and "position 1" in message and "(sample x)" in message
        for message in caplog.messages
    )


def test_replicas_in_a_file_are_added_and_removed_during_the_run(
    replicas: list[FaultyTeacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.client.addresses.RESOLVE_EVERY_S", 0.1)
    listing = tmp_path / "replicas"
    listing.write_text(f"# the first\n{replicas[0].url}\n", encoding="utf-8")

    async def until(pool: TeacherPool, replicas: int) -> None:
        async with asyncio.timeout(20):
            while (pool.stats()["t"].replicas, pool.stats()["t"].healthy) != (replicas, replicas):
                await pool.score("t", SEQUENCES[0], 1, TOP_K)

    async def run() -> None:
        async with TeacherPool([TeacherAddress("t", urls_file=listing)]) as pool:
            await pool.connect("t")
            await until(pool, 1)
            listing.write_text("\n".join(t.url for t in replicas), encoding="utf-8")
            await until(pool, 3)
            listing.write_text(replicas[2].url, encoding="utf-8")
            await until(pool, 1)
            listing.unlink()  # an unreadable file changes nothing
            await asyncio.sleep(0.3)
            await until(pool, 1)

    asyncio.run(run())


def test_a_dns_name_is_one_replica_per_address(replicas: list[FaultyTeacher], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with several addresses needs a name server, so its response is replaced."""

    async def two_addresses(self: object, host: str, port: int, **_: object) -> list[object]:
        assert host == "teachers.lab"
        return [(2, 1, 6, "", (ip, port)) for ip in ("127.0.0.1", "127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", two_addresses)

    async def run() -> tuple[int, int]:
        async with TeacherPool([TeacherAddress("t", (f"dns+http://teachers.lab:{replicas[0].port}",))]) as pool:
            await pool.connect("t")
            stats = pool.stats()["t"]
            return stats.replicas, stats.healthy

    assert asyncio.run(run()) == (2, 1)  # nobody listens on 127.0.0.2


async def until_kind(events: list[TeacherEvent], *kinds: str) -> None:
    async with asyncio.timeout(20):
        while [event.kind for event in events] != list(kinds):
            await asyncio.sleep(0.02)


def test_a_dropped_teacher_is_lost_at_once_and_joins_again(tiny_byte_level: Path) -> None:
    port, events = free_port(), list[TeacherEvent]()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), unavailable_timeout_s=2.0, on_unavailable="drop")

    async def run() -> None:
        async with TeacherPool([address], events.append) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            with pytest.raises(TeacherLost, match="teacher t at"):
                await pool.score("t", [1, 2, 3], 1, 4)
            began = time.monotonic()
            with pytest.raises(TeacherLost):
                await pool.score("t", [1, 2, 3], 1, 4)
            assert time.monotonic() - began < 1.0  # not the two seconds of unavailable_timeout_s
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await until_kind(events, "teacher_lost", "teacher_joined")
                assert len(await pool.score("t", [1, 2, 3], 1, 4)) == 2

    asyncio.run(run())
    assert {event.teacher for event in events} == {"t"}


def test_a_teacher_lost_by_overload_joins_again(tiny_byte_level: Path) -> None:
    """It never failed, so only losing the teacher starts a trial."""
    events, limits = list[TeacherEvent](), Limits(max_queued_tokens=16)
    engine = FormulaEngine(tiny_byte_level)

    async def run(url: str) -> None:
        address = TeacherAddress("t", (url,), unavailable_timeout_s=1.0, on_unavailable="drop")
        async with TeacherPool([address], events.append) as pool, httpx.AsyncClient() as other:
            await pool.connect("t")
            engine.open.clear()
            body = {"sequences": [[1] * 14], "starts": [1], "top_k": 4}
            busy = asyncio.create_task(other.post(f"{url}/v1/score", json=body, timeout=60))
            while engine.num_requests == 0:
                await asyncio.sleep(0.01)
            with pytest.raises(TeacherLost):
                await pool.score("t", [1, 2, 3], 1, 4)
            engine.open.set()
            await busy
            await until_kind(events, "teacher_lost", "teacher_joined")
            assert len(await pool.score("t", [1, 2, 3], 1, 4)) == 2

    with serving(engine, limits=limits) as url:
        asyncio.run(run(url))


def test_an_outage_of_many_replicas_does_not_fail_the_request(tiny_byte_level: Path) -> None:
    ports = [free_port() for _ in range(8)]
    address = TeacherAddress("t", tuple(f"http://127.0.0.1:{port}" for port in ports), unavailable_timeout_s=60)

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with ExitStack() as stack:
                for port in ports:
                    stack.enter_context(serving(FormulaEngine(tiny_byte_level), port=port))
                await pool.connect("t")
            pending = asyncio.create_task(pool.score("t", [1, 2, 3], 1, 4))
            done, _ = await asyncio.wait([pending], timeout=1.0)
            assert not done
            with serving(FormulaEngine(tiny_byte_level), port=ports[0]):
                assert len(await asyncio.wait_for(pending, 30)) == 2

    asyncio.run(run())


def test_a_teacher_that_is_too_busy_for_its_check_is_a_clear_error(tiny_byte_level: Path) -> None:
    async def unavailable(*_: object) -> None:
        raise Unavailable("teacher t: busy")

    async def find(url: str) -> ReplicaClient:
        client = NativeClient("t", url)
        client.check = unavailable  # type: ignore[method-assign, assignment]
        return client

    async def run(url: str) -> None:
        health = ReplicaHealth(TeacherAddress("t", (url,)), find, lambda _: None)
        try:
            await health.connect()
        finally:
            await health.aclose()

    with serving(FormulaEngine(tiny_byte_level)) as url, pytest.raises(Unavailable, match="busy"):
        asyncio.run(run(url))


def test_on_unavailable_stop_ends_without_waiting(tiny_byte_level: Path) -> None:
    port, events = free_port(), list[TeacherEvent]()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), unavailable_timeout_s=600, on_unavailable="stop")

    async def run() -> None:
        async with TeacherPool([address], events.append) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 4), 20)

    with pytest.raises(Unavailable, match="teacher t at"):
        asyncio.run(run())
    assert [event.kind for event in events] == ["teacher_lost"]


def test_a_replica_with_other_weights_is_banned_and_the_others_continue(tiny_byte_level: Path) -> None:
    port, good = free_port(), FormulaEngine(tiny_byte_level)

    async def run(url: str) -> tuple[int, int]:
        async with TeacherPool([TeacherAddress("t", (f"http://127.0.0.1:{port}", url))]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            with serving(FormulaEngine(tiny_byte_level, fingerprint="0" * 64), port=port):
                await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(40)))
            stats = pool.stats()["t"]
            return stats.requests, stats.healthy

    with serving(good) as url:
        assert asyncio.run(run(url)) == (40, 1)


def test_a_teacher_whose_replicas_are_all_banned_is_lost(tiny_byte_level: Path) -> None:
    ports = [free_port(), free_port()]
    address = TeacherAddress("t", tuple(f"http://127.0.0.1:{port}" for port in ports))
    others = [FormulaEngine(tiny_byte_level, fingerprint="0" * 64) for _ in ports]

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=ports[0]):
                with serving(FormulaEngine(tiny_byte_level), port=ports[1]):
                    await pool.connect("t")
            with serving(others[0], port=ports[0]):
                with serving(others[1], port=ports[1]):
                    await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 4), 20)

    with pytest.raises(FingerprintMismatch, match=r"teacher t at http://127.0.0.1:\d+: expected fingerprint"):
        asyncio.run(run())


def test_a_request_that_always_fails_raises_although_the_replica_is_healthy(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    original = engine.alter
    engine.alter = lambda rows: 1 / 0 if len(rows) == 6 else original(rows)  # type: ignore[method-assign, assignment, return-value]

    async def run(url: str) -> None:
        async with TeacherPool([TeacherAddress("t", (url,))]) as pool:
            await pool.connect("t")
            await asyncio.wait_for(pool.score("t", [1, 2, 3, 4, 5, 6, 7], 1, 4), 100)

    with serving(engine) as url, pytest.raises(Unavailable, match="broke off|ended after|closed before"):
        asyncio.run(run(url))
