"""Several teachers, several replicas, asked as one."""

import asyncio
from pathlib import Path

import pytest

from teachers.asking.address import TeacherAddress
from teachers.asking.pool import TeacherPool
from teachers.errors import FingerprintMismatch, InvalidRows, Rejected, Unavailable
from teachers.rows import Rows
from tests.serve import FormulaEngine, free_port, serving, until


async def ask_many(addresses: list[TeacherAddress], count: int) -> list[Rows]:
    async with TeacherPool(addresses) as pool:
        for address in addresses:
            await pool.connect(address.name)
        jobs = [pool.score(a.name, list(range(5 + n)), 1, 4) for n in range(count) for a in addresses]
        return await asyncio.gather(*jobs)


def test_every_sample_is_answered_by_every_teacher(tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as one, serving(FormulaEngine(tiny_sentencepiece)) as two:
        rows = asyncio.run(ask_many([TeacherAddress("one", (one,)), TeacherAddress("two", (two,))], 10))
    assert [len(r) for r in rows] == [4 + n for n in range(10) for _ in range(2)]


def test_replicas_share_the_work(tiny_byte_level: Path) -> None:
    engines = [FormulaEngine(tiny_byte_level, delay_s=0.1) for _ in range(2)]
    with serving(engines[0]) as one, serving(engines[1]) as two:
        asyncio.run(ask_many([TeacherAddress("t", (one, two), concurrency=2)], 20))
    assert sum(e.finished for e in engines) == 20
    assert min(e.finished for e in engines) >= 7


def test_no_more_questions_are_under_way_than_allowed(tiny_byte_level: Path) -> None:
    class Counting(FormulaEngine):
        now = most = 0

        async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return await super().score(sequence, start, top_k)
            finally:
                self.now -= 1

    engine = Counting(tiny_byte_level, delay_s=0.01)
    with serving(engine) as url:
        asyncio.run(ask_many([TeacherAddress("t", (url,), concurrency=3)], 20))
    assert engine.most == 3


def test_a_replica_that_is_down_costs_no_sample(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        down = f"http://127.0.0.1:{free_port()}"
        rows = asyncio.run(ask_many([TeacherAddress("t", (down, url), patience_s=20)], 6))
    assert len(rows) == 6


def test_a_teacher_that_goes_and_comes_back_costs_time_and_no_sample(tiny_byte_level: Path) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), patience_s=30)

    async def run() -> tuple[Rows, Rows]:
        async with TeacherPool([address]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
                before = await pool.score("t", [1, 2, 3], 1, 4)
            waiting = asyncio.create_task(pool.score("t", [1, 2, 3], 1, 4))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            with serving(FormulaEngine(tiny_byte_level), port=port):
                return before, await waiting

    before, after = asyncio.run(run())
    assert (before.ids == after.ids).all()


def test_a_replica_that_comes_back_is_asked_again(tiny_byte_level: Path) -> None:
    steady, port = FormulaEngine(tiny_byte_level, delay_s=0.01), free_port()

    async def run(url: str) -> int:
        async with TeacherPool([TeacherAddress("t", (f"http://127.0.0.1:{port}", url), patience_s=20)]) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(8)))
            back = FormulaEngine(tiny_byte_level, delay_s=0.01)
            with serving(back, port=port):
                await until(lambda: pool.stats()["t"].serving == 2)
                await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(40)))
            return back.finished

    with serving(steady) as url:
        assert asyncio.run(run(url)) >= 10


def test_patience_does_not_count_the_time_behind_other_questions(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level, delay_s=0.5)

    async def run(url: str) -> list[Rows]:
        async with TeacherPool([TeacherAddress("t", (url,), patience_s=3.0, concurrency=1)]) as pool:
            await pool.connect("t")
            return await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(8)))

    failing = iter([True])
    answer = engine.alter
    engine.alter = lambda rows: 1 / 0 if engine.finished == 6 and next(failing, False) else answer(rows)  # type: ignore
    with serving(engine) as url:
        assert len(asyncio.run(run(url))) == 8


def test_patience_ends_with_the_last_error(tiny_byte_level: Path) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), patience_s=0.5)

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            await pool.score("t", [1, 2, 3], 1, 4)

    with pytest.raises(Unavailable, match="teacher t at"):
        asyncio.run(run())


def test_a_teacher_that_comes_back_with_other_weights_is_refused(tiny_byte_level: Path) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), patience_s=5)

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            with serving(FormulaEngine(tiny_byte_level, fingerprint="0" * 64), port=port):
                await pool.score("t", [1, 2, 3], 1, 4)

    with pytest.raises(FingerprintMismatch, match="teacher t at .* other weights"):
        asyncio.run(run())


def test_replicas_that_differ_are_refused(tiny_byte_level: Path) -> None:
    engines = FormulaEngine(tiny_byte_level), FormulaEngine(tiny_byte_level, fingerprint="0" * 64)
    with serving(engines[0]) as one, serving(engines[1]) as two:
        with pytest.raises(FingerprintMismatch, match="expected fingerprint (f+, received 0+|0+, received f+)"):
            asyncio.run(ask_many([TeacherAddress("t", (one, two))], 1))


def test_what_cannot_be_asked_again_is_raised_at_once(tiny_byte_level: Path) -> None:
    async def run(url: str) -> None:
        async with TeacherPool([TeacherAddress("t", (url,), patience_s=60)]) as pool:
            await pool.connect("t")
            await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 65), 5)

    with serving(FormulaEngine(tiny_byte_level)) as url, pytest.raises(Rejected, match="at most 64"):
        asyncio.run(run(url))


def test_rows_no_model_can_mean_name_the_teacher(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)

    def nan(rows: Rows) -> Rows:
        rows.actual[0] = float("nan")
        return rows

    engine.alter = nan  # type: ignore[method-assign]
    with serving(engine) as url, pytest.raises(InvalidRows, match="teacher t at .*position 1"):
        asyncio.run(ask_many([TeacherAddress("t", (url,))], 1))


def test_keys_are_not_in_the_representation() -> None:
    assert "secret" not in repr(TeacherAddress("t", ("http://x",), key="secret"))
