"""One teacher of several processes: what happens to them costs time, never an answer, and never changes one."""

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

from teachers.asking.address import TeacherAddress
from teachers.asking.client import Client, TeacherClient
from teachers.asking.pool import TeacherPool
from teachers.asking.roster import Event, Roster
from teachers.errors import FingerprintMismatch, InvalidRows, TeacherLost, Unavailable
from teachers.limits import Limits
from teachers.protocol import ScoreRequest
from teachers.rows import Rows, StreamWriter, read_stream
from tests.faulty import Fault, FaultyTeacher, faulty_teachers, rows_of
from tests.serve import FormulaEngine, free_port, serving

NUM_QUESTIONS, TOP_K = 150, 16
SEQUENCES = [[1 + n % 200, 2 + n // 200, *range(3, 12 + n % 23)] for n in range(NUM_QUESTIONS)]


@pytest.fixture(scope="module")
def trio(tiny_byte_level: Path) -> Iterator[list[FaultyTeacher]]:
    with faulty_teachers(tiny_byte_level, 3) as teachers:
        yield teachers


@pytest.fixture(autouse=True)
def mended(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "trio" in request.fixturenames:
        for teacher in request.getfixturevalue("trio"):
            if not teacher.running:
                teacher.start()
            teacher.send_signal(signal.SIGCONT)
            teacher.await_ready()
            teacher.set_fault("none")


def address_of(teachers: list[FaultyTeacher], **options: object) -> TeacherAddress:
    return TeacherAddress("t", tuple(t.url for t in teachers), **options)  # type: ignore[arg-type]


def ask_all(address: TeacherAddress, disturb: Callable[[], None]) -> tuple[list[Rows], dict[str, int]]:
    """Every question at once, disturbed when a quarter is answered."""

    async def run() -> tuple[list[Rows], dict[str, int]]:
        async with TeacherPool([address]) as pool:
            await pool.connect("t")
            tasks = [asyncio.create_task(pool.score("t", sequence, 1, TOP_K, "x")) for sequence in SEQUENCES]
            while sum(task.done() for task in tasks) < NUM_QUESTIONS // 4:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(disturb)
            answers = await asyncio.wait_for(asyncio.gather(*tasks), 60)
            return answers, vars(pool.stats()["t"])

    return asyncio.run(run())


def assert_undisturbed(answers: list[Rows], vocab_size: int) -> None:
    """Bit for bit what a teacher alone and in peace answers, in the order of the questions."""
    for sequence, answer in zip(SEQUENCES, answers, strict=True):
        expected = over_the_wire(sequence, vocab_size)
        for name in ("ids", "logprobs", "actual", "tail"):
            assert (getattr(answer, name) == getattr(expected, name)).all(), (sequence, name)


def over_the_wire(sequence: list[int], vocab_size: int) -> Rows:
    from tests.teachers.test_protocol import CARD

    card = CARD.model_copy(update={"vocab_size": vocab_size})
    writer = StreamWriter(TOP_K, card.fingerprint)
    data = writer.write(0, rows_of(sequence, 1, TOP_K, vocab_size)) + writer.close()
    return read_stream(data, ScoreRequest(sequences=[sequence], starts=[1], top_k=TOP_K), card)[0]


@pytest.fixture(scope="module")
def vocab_size(tiny_byte_level: Path) -> int:
    return FormulaEngine(tiny_byte_level).card.vocab_size


@pytest.mark.parametrize("fault", ["slow", "cut", "noise", "nan", "unsorted", "foreign", "busy"])
def test_a_replica_that_misbehaves_costs_no_answer_and_changes_none(
    trio: list[FaultyTeacher], vocab_size: int, fault: Fault
) -> None:
    answers, stats = ask_all(address_of(trio), lambda: trio[1].set_fault(fault))
    assert_undisturbed(answers, vocab_size)
    assert stats["questions"] == NUM_QUESTIONS
    assert fault == "slow" or stats["asked_again"] >= 1
    assert (stats["rejected"] > 0) == (fault in ("nan", "unsorted", "foreign"))  # noise looks like an answer cut short


def test_a_replica_that_is_killed_costs_no_answer(trio: list[FaultyTeacher], vocab_size: int) -> None:
    answers, stats = ask_all(address_of(trio), trio[0].kill)
    assert_undisturbed(answers, vocab_size)
    assert stats["serving"] == 2


def test_a_replica_that_is_stopped_is_found_out_and_left(trio: list[FaultyTeacher], vocab_size: int) -> None:
    """SIGSTOP: the connection stays, and nothing ever comes. A question's own time limit is a minute away."""
    began = time.monotonic()
    answers, _ = ask_all(address_of(trio, timeout_s=60), lambda: trio[2].send_signal(signal.SIGSTOP))
    assert_undisturbed(answers, vocab_size)
    assert time.monotonic() - began < 40


def test_stragglers_are_asked_twice_and_only_a_few_of_them(trio: list[FaultyTeacher], vocab_size: int) -> None:
    async def run() -> dict[str, int]:
        async with TeacherPool([address_of(trio, concurrency=2)]) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", s, 1, TOP_K) for s in SEQUENCES))
            await asyncio.to_thread(trio[0].set_fault, "slow")
            for _ in range(3):
                answers = await asyncio.gather(*(pool.score("t", s, 1, TOP_K) for s in SEQUENCES))
                assert_undisturbed(answers, vocab_size)
            return vars(pool.stats()["t"])

    stats = asyncio.run(run())
    assert 1 <= stats["hedged"] <= 0.03 * stats["questions"] + 4


def test_nonsense_from_two_replicas_in_a_row_is_raised_with_teacher_and_replica(trio: list[FaultyTeacher]) -> None:
    async def run() -> None:
        async with TeacherPool([address_of(trio)]) as pool:
            await pool.connect("t")
            for teacher in trio:
                await asyncio.to_thread(teacher.set_fault, "nan")
            await asyncio.wait_for(pool.score("t", SEQUENCES[0], 1, TOP_K), 20)

    with pytest.raises(InvalidRows, match=r"teacher t at http://.*sequence 0, position 1: a value that is not finite"):
        asyncio.run(run())


def test_a_rejected_question_goes_elsewhere_although_its_replica_is_back_first(tiny_byte_level: Path) -> None:
    """Nonsense about long texts only, so that the replica passes its trials, and the other one is slow and full."""
    bad, good = FormulaEngine(tiny_byte_level), FormulaEngine(tiny_byte_level, delay_s=0.6)
    bad.alter = lambda rows: replace(rows, logprobs=rows.logprobs[:, ::-1]) if len(rows) > 10 else rows  # type: ignore[method-assign]

    async def run(urls: tuple[str, ...]) -> int:
        async with TeacherPool([TeacherAddress("t", urls, concurrency=1)]) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", list(range(20)), 1, TOP_K) for _ in range(6)))
            return pool.stats()["t"].rejected

    with serving(bad) as one, serving(good) as two:
        assert asyncio.run(run((one, two))) >= 2


def test_a_rejected_answer_is_logged_with_its_sample(
    trio: list[FaultyTeacher], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "tutelage.pool"):
        ask_all(address_of(trio), lambda: trio[1].set_fault("unsorted"))
    assert any(
        trio[1].url in message and "position 1" in message and "(sample x)" in message for message in caplog.messages
    )


def test_replicas_in_a_file_join_and_leave_while_the_run_goes_on(
    trio: list[FaultyTeacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.asking.roster.LOOK_AGAIN_S", 0.1)
    listing = tmp_path / "replicas"
    listing.write_text(f"# the first\n{trio[0].url}\n", encoding="utf-8")

    async def until(pool: TeacherPool, replicas: int) -> None:
        async with asyncio.timeout(20):
            while (pool.stats()["t"].replicas, pool.stats()["t"].serving) != (replicas, replicas):
                await pool.score("t", SEQUENCES[0], 1, TOP_K)

    async def run() -> None:
        async with TeacherPool([TeacherAddress("t", urls_file=listing)]) as pool:
            await pool.connect("t")
            await until(pool, 1)
            listing.write_text("\n".join(t.url for t in trio), encoding="utf-8")
            await until(pool, 3)
            listing.write_text(trio[2].url, encoding="utf-8")
            await until(pool, 1)
            listing.unlink()  # what cannot be read changes nothing
            await asyncio.sleep(0.3)
            await until(pool, 1)

    asyncio.run(run())


def test_a_name_is_as_many_replicas_as_it_has_addresses(
    trio: list[FaultyTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with several addresses cannot be made without a name server, so this one answer is made up."""

    async def two_addresses(self: object, host: str, port: int, **_: object) -> list[object]:
        assert host == "teachers.lab"
        return [(2, 1, 6, "", (ip, port)) for ip in ("127.0.0.1", "127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", two_addresses)

    async def run() -> tuple[int, int]:
        async with TeacherPool([TeacherAddress("t", (f"dns+http://teachers.lab:{trio[0].port}",))]) as pool:
            await pool.connect("t")
            stats = pool.stats()["t"]
            return stats.replicas, stats.serving

    assert asyncio.run(run()) == (2, 1)  # nobody listens on 127.0.0.2


async def until_kind(events: list[Event], *kinds: str) -> None:
    async with asyncio.timeout(20):
        while [event.kind for event in events] != list(kinds):
            await asyncio.sleep(0.02)


def test_a_dropped_teacher_is_left_out_at_once_and_joins_again(tiny_byte_level: Path) -> None:
    port, events = free_port(), list[Event]()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), patience_s=2.0, on_loss="drop")

    async def run() -> None:
        async with TeacherPool([address], events.append) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            with pytest.raises(TeacherLost, match="teacher t at"):
                await pool.score("t", [1, 2, 3], 1, 4)
            began = time.monotonic()
            with pytest.raises(TeacherLost):
                await pool.score("t", [1, 2, 3], 1, 4)
            assert time.monotonic() - began < 1.0  # and not the two seconds of its patience
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await until_kind(events, "teacher_lost", "teacher_joined")
                assert len(await pool.score("t", [1, 2, 3], 1, 4)) == 2

    asyncio.run(run())
    assert {event.teacher for event in events} == {"t"}


def test_a_teacher_that_was_only_busy_comes_back_too(tiny_byte_level: Path) -> None:
    """It never failed, so nothing else would try it out."""
    events, limits = list[Event](), Limits(max_queued_tokens=16)
    engine = FormulaEngine(tiny_byte_level)

    async def run(url: str) -> None:
        address = TeacherAddress("t", (url,), patience_s=1.0, on_loss="drop")
        async with TeacherPool([address], events.append) as pool, httpx.AsyncClient() as other:
            await pool.connect("t")
            engine.open.clear()
            body = {"sequences": [[1] * 14], "starts": [1], "top_k": 4}
            busy = asyncio.create_task(other.post(f"{url}/v1/score", json=body, timeout=60))
            while engine.asked == 0:
                await asyncio.sleep(0.01)
            with pytest.raises(TeacherLost):
                await pool.score("t", [1, 2, 3], 1, 4)
            engine.open.set()
            await busy
            await until_kind(events, "teacher_lost", "teacher_joined")
            assert len(await pool.score("t", [1, 2, 3], 1, 4)) == 2

    with serving(engine, limits=limits) as url:
        asyncio.run(run(url))


def test_an_outage_of_many_replicas_is_not_the_questions_fault(tiny_byte_level: Path) -> None:
    ports = [free_port() for _ in range(8)]
    address = TeacherAddress("t", tuple(f"http://127.0.0.1:{port}" for port in ports), patience_s=60)

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with ExitStack() as stack:
                for port in ports:
                    stack.enter_context(serving(FormulaEngine(tiny_byte_level), port=port))
                await pool.connect("t")
            question = asyncio.create_task(pool.score("t", [1, 2, 3], 1, 4))
            done, _ = await asyncio.wait([question], timeout=1.0)
            assert not done
            with serving(FormulaEngine(tiny_byte_level), port=ports[0]):
                assert len(await asyncio.wait_for(question, 30)) == 2

    asyncio.run(run())


def test_a_teacher_that_is_there_but_too_busy_to_be_checked_is_a_clear_error(tiny_byte_level: Path) -> None:
    async def unavailable(*_: object) -> None:
        raise Unavailable("teacher t: busy")

    async def find(url: str) -> Client:
        client = TeacherClient("t", url)
        client.check = unavailable  # type: ignore[method-assign, assignment]
        return client

    async def run(url: str) -> None:
        roster = Roster(TeacherAddress("t", (url,)), find, lambda _: None)
        try:
            await roster.connect()
        finally:
            await roster.aclose()

    with serving(FormulaEngine(tiny_byte_level)) as url, pytest.raises(Unavailable, match="busy"):
        asyncio.run(run(url))


def test_stop_ends_without_patience(tiny_byte_level: Path) -> None:
    port, events = free_port(), list[Event]()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), patience_s=600, on_loss="stop")

    async def run() -> None:
        async with TeacherPool([address], events.append) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 4), 20)

    with pytest.raises(Unavailable, match="teacher t at"):
        asyncio.run(run())
    assert [event.kind for event in events] == ["teacher_lost"]


def test_one_replica_with_other_weights_is_refused_and_the_others_go_on(tiny_byte_level: Path) -> None:
    port, good = free_port(), FormulaEngine(tiny_byte_level)

    async def run(url: str) -> tuple[int, int]:
        async with TeacherPool([TeacherAddress("t", (f"http://127.0.0.1:{port}", url))]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            with serving(FormulaEngine(tiny_byte_level, fingerprint="0" * 64), port=port):
                await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(40)))
            stats = pool.stats()["t"]
            return stats.questions, stats.serving

    with serving(good) as url:
        assert asyncio.run(run(url)) == (40, 1)


def test_a_teacher_whose_replicas_are_all_others_now_is_refused_by_name(tiny_byte_level: Path) -> None:
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


def test_one_question_that_always_fails_ends_while_others_are_answered(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    answer = engine.alter
    engine.alter = lambda rows: 1 / 0 if len(rows) == 6 else answer(rows)  # type: ignore[method-assign, assignment, return-value]

    async def run(url: str) -> None:
        async with TeacherPool([TeacherAddress("t", (url,))]) as pool:
            await pool.connect("t")
            await asyncio.wait_for(pool.score("t", [1, 2, 3, 4, 5, 6, 7], 1, 4), 100)

    with serving(engine) as url, pytest.raises(Unavailable, match="broke off|ended after|closed before"):
        asyncio.run(run(url))
