"""3 teachers × 3 replicas while their processes are disturbed at random: is every answer there, and unchanged?

`python -m benchmarks.chaos [--seconds 600] [--seed N] [--json FILE]`. Replicas are killed (kill -9, started again
later), stopped (SIGSTOP), slowed 20 times, cut in mid-answer, made to answer noise, NaN, unsorted rows and foreign
ids, and to refuse with 503. At any moment one replica of each teacher is left in peace, and one at most talks nonsense,
as two nonsensical answers to one question end a run by intention. Samples are asked of all teachers at once, a fixed
number at a time; each answer is compared bit by bit with what a replica in peace gives. Throughput before the
disturbances, from the same processes, is what the time lost is measured against.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from teachers.asking.address import TeacherAddress
from teachers.asking.pool import TeacherPool
from teachers.protocol import Card
from teachers.rows import Rows, as_received
from tests.faulty import FAULTS, FaultyTeacher, faulty_teachers, rows_of
from tests.tiny import save_tiny_model

NUM_TEACHERS, NUM_REPLICAS, AT_ONCE, TOP_K = 3, 3, 24, 16
DELAY_S = 0.02
PEACE_S = 20.0
NONSENSE = ("nan", "unsorted", "foreign")
KINDS = ("kill", "stop", *(fault for fault in FAULTS if fault != "none"))


@dataclass
class Tally:
    """What came back."""

    samples: int = 0
    answers: int = 0
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)


def sequence_of(index: int) -> list[int]:
    """Another question for every sample, 10 to 60 tokens long."""
    rng = random.Random(index)
    return [rng.randrange(400) for _ in range(rng.randrange(10, 60))]


def same(one: Rows, two: Rows) -> bool:
    """Bit for bit."""
    return all((getattr(one, name) == getattr(two, name)).all() for name in ("ids", "logprobs", "actual", "tail"))


async def ask(pool: TeacherPool, cards: Sequence[Card], index: int, tally: Tally) -> None:
    """One sample, all teachers."""
    sequence, began = sequence_of(index), time.monotonic()
    answers = await asyncio.gather(*(pool.score(f"t{n}", sequence, 1, TOP_K, f"#{index}") for n in range(NUM_TEACHERS)))
    tally.seconds.append(time.monotonic() - began)
    for card, answer in zip(cards, answers, strict=True):
        expected = as_received(rows_of(sequence, 1, TOP_K, card.vocab_size), sequence, card)
        tally.answers += 1
        tally.wrong += not same(answer, expected)
    tally.samples += 1


async def keep_asking(pool: TeacherPool, cards: Sequence[Card], indices: Iterator[int], until: float) -> Tally:
    """AT_ONCE samples under way until the clock says `until`; all that were begun are finished."""
    tally = Tally()

    async def one_after_the_other() -> None:
        while time.monotonic() < until:
            await ask(pool, cards, next(indices), tally)

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return tally


async def disturb(teachers: Sequence[FaultyTeacher], rng: random.Random, until: float, done: Counter[str]) -> None:
    """Disturb one teacher: two replicas at most at a time, one at most with nonsense; all are well in the end."""
    disturbed: dict[FaultyTeacher, str] = {}

    async def one(teacher: FaultyTeacher, kind: str) -> None:
        await asyncio.to_thread(begin, teacher, kind)
        await asyncio.sleep(rng.uniform(2, 8))
        await asyncio.to_thread(end, teacher, kind)
        del disturbed[teacher]

    tasks = []
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(0.5, 4))
        kind = rng.choice(KINDS)
        free = [teacher for teacher in teachers if teacher not in disturbed]
        if len(disturbed) < NUM_REPLICAS - 1 and not (kind in NONSENSE and set(NONSENSE) & set(disturbed.values())):
            teacher = rng.choice(free)
            disturbed[teacher] = kind
            done[kind] += 1
            tasks.append(asyncio.create_task(one(teacher, kind)))
    await asyncio.gather(*tasks)


def begin(teacher: FaultyTeacher, kind: str) -> None:
    if kind == "kill":
        teacher.kill()
    elif kind == "stop":
        teacher.send_signal(signal.SIGSTOP)
    else:
        teacher.set_fault(kind)  # type: ignore[arg-type]


def end(teacher: FaultyTeacher, kind: str) -> None:
    if kind == "kill":
        teacher.start().await_ready()
    elif kind == "stop":
        teacher.send_signal(signal.SIGCONT)
    else:
        teacher.set_fault("none")


async def measure(fleets: Sequence[Sequence[FaultyTeacher]], seconds: float, seed: int) -> dict[str, float]:
    """Peace, then chaos."""
    addresses = [TeacherAddress(f"t{n}", tuple(t.url for t in fleet)) for n, fleet in enumerate(fleets)]
    indices, kinds = itertools.count(), Counter[str]()
    async with TeacherPool(addresses) as pool:
        cards = [(await pool.connect(address.name))[0] for address in addresses]
        peace = await keep_asking(pool, cards, indices, time.monotonic() + PEACE_S)
        before = pool.stats()
        began = time.monotonic()
        until = began + seconds
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(keep_asking(pool, cards, indices, until))
            for n, fleet in enumerate(fleets):
                group.create_task(disturb(fleet, random.Random(seed + n), until, kinds))
        chaos = asking.result()
        took = time.monotonic() - began
        after = pool.stats()
    counts = {
        name: sum(getattr(after[k], name) - getattr(before[k], name) for k in after)
        for name in ("questions", "asked_again", "hedged", "rejected")
    }
    rates = peace.samples / PEACE_S, chaos.samples / seconds
    return {
        "chaos_seconds": took,
        "chaos_samples": chaos.samples,
        "chaos_answers": chaos.answers,
        "chaos_missing": chaos.samples * NUM_TEACHERS - counts["questions"],
        "chaos_wrong": peace.wrong + chaos.wrong,
        **{f"chaos_{name}": value for name, value in counts.items()},
        **{f"chaos_fault_{kind}": kinds[kind] for kind in KINDS},
        "chaos_peace_samples_per_s": rates[0],
        "chaos_samples_per_s": rates[1],
        "chaos_time_lost_s": seconds * (1 - rates[1] / rates[0]),
        **{f"chaos_peace_{name}": value for name, value in latencies(peace).items()},
        **{f"chaos_{name}": value for name, value in latencies(chaos).items()},
    }


def latencies(tally: Tally) -> dict[str, float]:
    hundredths = statistics.quantiles(tally.seconds, n=100)
    return {"p50_s": hundredths[49], "p99_s": hundredths[98], "longest_s": max(tally.seconds)}


def table(figures: dict[str, float]) -> str:
    return "".join(f"{name.removeprefix('chaos_'):<24}{value:>12,.4g}\n" for name, value in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to disturb")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    logging.getLogger("tutelage.pool").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = save_tiny_model(Path(folder) / "model", kind="byte_level", seed=1)
        fleets = [stack.enter_context(faulty_teachers(model, NUM_REPLICAS, DELAY_S)) for _ in range(NUM_TEACHERS)]
        figures = asyncio.run(measure(fleets, arguments.seconds, arguments.seed))
    sys.stdout.write(table(figures))
    if arguments.json:
        kept = {name: round(value, 4) for name, value in figures.items()}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(1 if figures["chaos_wrong"] or figures["chaos_missing"] else 0)


if __name__ == "__main__":
    main()
