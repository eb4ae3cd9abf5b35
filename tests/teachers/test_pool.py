"""Several teachers with several replicas in one pool."""

import asyncio
from pathlib import Path

import pytest

from teachers.client.addresses import TeacherAddress
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import FingerprintMismatch, InvalidRows, Rejected, Unavailable
from teachers.protocol.rows import Rows
from tests.serve import FormulaEngine, free_port, serving, until

pytestmark = pytest.mark.slow


async def score_many(addresses: list[TeacherAddress], count: int) -> list[Rows]:
    async with TeacherPool(addresses) as pool:
        for address in addresses:
            await pool.connect(address.name)
        jobs = [pool.score(a.name, list(range(5 + n)), 1, 4) for n in range(count) for a in addresses]
        return await asyncio.gather(*jobs)


def test_every_teacher_scores_every_sample(tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as one, serving(FormulaEngine(tiny_sentencepiece)) as two:
        rows = asyncio.run(score_many([TeacherAddress("one", (one,)), TeacherAddress("two", (two,))], 10))
    assert [len(r) for r in rows] == [4 + n for n in range(10) for _ in range(2)]


def test_replicas_share_the_work(tiny_byte_level: Path) -> None:
    engines = [FormulaEngine(tiny_byte_level, delay_s=0.1) for _ in range(2)]
    with serving(engines[0]) as one, serving(engines[1]) as two:
        asyncio.run(score_many([TeacherAddress("t", (one, two), concurrency=2)], 20))
    assert sum(e.finished for e in engines) == 20
    assert min(e.finished for e in engines) >= 7


def test_concurrent_requests_stay_within_the_limit(tiny_byte_level: Path) -> None:
    class Counting(FormulaEngine):
        now = peak = 0

        async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
            self.now += 1
            self.peak = max(self.peak, self.now)
            try:
                return await super().score(sequence, start, top_k)
            finally:
                self.now -= 1

    engine = Counting(tiny_byte_level, delay_s=0.01)
    with serving(engine) as url:
        asyncio.run(score_many([TeacherAddress("t", (url,), concurrency=3)], 20))
    assert engine.peak == 3


def test_an_unavailable_replica_loses_no_sample(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        down = f"http://127.0.0.1:{free_port()}"
        rows = asyncio.run(score_many([TeacherAddress("t", (down, url), unavailable_timeout_s=20)], 6))
    assert len(rows) == 6


def test_a_restarted_teacher_loses_no_sample(tiny_byte_level: Path) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), unavailable_timeout_s=30)

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


def test_a_restarted_replica_receives_requests_again(tiny_byte_level: Path) -> None:
    steady, port = FormulaEngine(tiny_byte_level, delay_s=0.01), free_port()

    async def run(url: str) -> int:
        async with TeacherPool(
            [TeacherAddress("t", (f"http://127.0.0.1:{port}", url), unavailable_timeout_s=20)]
        ) as pool:
            await pool.connect("t")
            await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(8)))
            back = FormulaEngine(tiny_byte_level, delay_s=0.01)
            with serving(back, port=port):
                await until(lambda: pool.stats()["t"].healthy == 2)
                await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(40)))
            return back.finished

    with serving(steady) as url:
        assert asyncio.run(run(url)) >= 10


def test_the_unavailable_timeout_excludes_queueing_behind_other_requests(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level, delay_s=0.5)

    async def run(url: str) -> list[Rows]:
        async with TeacherPool([TeacherAddress("t", (url,), unavailable_timeout_s=3.0, concurrency=1)]) as pool:
            await pool.connect("t")
            return await asyncio.gather(*(pool.score("t", [1, 2, 3], 1, 4) for _ in range(8)))

    failing = iter([True])
    original = engine.alter
    engine.alter = lambda rows: 1 / 0 if engine.finished == 6 and next(failing, False) else original(rows)  # type: ignore
    with serving(engine) as url:
        assert len(asyncio.run(run(url))) == 8


def test_the_unavailable_timeout_raises_the_last_error(tiny_byte_level: Path) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), unavailable_timeout_s=0.5)

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            await pool.score("t", [1, 2, 3], 1, 4)

    with pytest.raises(Unavailable, match="teacher t at"):
        asyncio.run(run())


def test_a_teacher_restarted_with_other_weights_is_rejected(tiny_byte_level: Path) -> None:
    port = free_port()
    address = TeacherAddress("t", (f"http://127.0.0.1:{port}",), unavailable_timeout_s=5)

    async def run() -> None:
        async with TeacherPool([address]) as pool:
            with serving(FormulaEngine(tiny_byte_level), port=port):
                await pool.connect("t")
            with serving(FormulaEngine(tiny_byte_level, fingerprint="0" * 64), port=port):
                await pool.score("t", [1, 2, 3], 1, 4)

    with pytest.raises(FingerprintMismatch, match="teacher t at .* other weights"):
        asyncio.run(run())


def test_different_replicas_are_rejected(tiny_byte_level: Path) -> None:
    engines = FormulaEngine(tiny_byte_level), FormulaEngine(tiny_byte_level, fingerprint="0" * 64)
    with serving(engines[0]) as one, serving(engines[1]) as two:
        with pytest.raises(FingerprintMismatch, match="expected fingerprint (f+, received 0+|0+, received f+)"):
            asyncio.run(score_many([TeacherAddress("t", (one, two))], 1))


def test_a_rejected_request_is_raised_at_once(tiny_byte_level: Path) -> None:
    async def run(url: str) -> None:
        async with TeacherPool([TeacherAddress("t", (url,), unavailable_timeout_s=60)]) as pool:
            await pool.connect("t")
            await asyncio.wait_for(pool.score("t", [1, 2, 3], 1, 65), 5)

    with serving(FormulaEngine(tiny_byte_level)) as url, pytest.raises(Rejected, match="at most 64"):
        asyncio.run(run(url))


def test_invalid_rows_name_the_teacher(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)

    def nan(rows: Rows) -> Rows:
        rows.actual[0] = float("nan")
        return rows

    engine.alter = nan  # type: ignore[method-assign]
    with serving(engine) as url, pytest.raises(InvalidRows, match="teacher t at .*position 1"):
        asyncio.run(score_many([TeacherAddress("t", (url,))], 1))


def test_keys_are_not_in_the_representation() -> None:
    assert "secret" not in repr(TeacherAddress("t", ("http://x",), key="secret"))
