"""Check that no response of 3 teachers × 3 replicas is lost or changed while random faults are injected.

`python -m benchmarks.chaos [--seconds 600] [--seed N] [--json FILE]`. Faults: killed (SIGKILL,
restarted later), stopped (SIGSTOP), 20 × slower, truncated responses, noise, NaN, unsorted rows, unknown ids, 503. At
any time at least one replica of each teacher has no fault, and at most one returns invalid rows, since two invalid
responses to one request end a run by design. A fixed number of samples is in flight, each sent to all teachers. Every
response is compared bit by bit with that of a replica without faults. The time lost is relative to the throughput of
the same processes before the faults.
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

from teachers.client.addresses import TeacherAddress
from teachers.client.pool import TeacherPool
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from tests.faulty import FAULTS, FaultyTeacher, faulty_teachers, rows_of
from tests.tiny import save_tiny_model

NUM_TEACHERS, NUM_REPLICAS, AT_ONCE, TOP_K = 3, 3, 24, 16
DELAY_S = 0.02
CALM_S = 20.0
INVALID_ROWS = ("nan", "unsorted", "foreign")
KINDS = ("kill", "stop", *(fault for fault in FAULTS if fault != "none"))


@dataclass
class Tally:
    """Counts and latencies of the responses."""

    samples: int = 0
    responses: int = 0
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)


def sequence_of(index: int) -> list[int]:
    """Return the sequence of a sample: 10 to 60 tokens."""
    rng = random.Random(index)
    return [rng.randrange(400) for _ in range(rng.randrange(10, 60))]


def same(one: Rows, two: Rows) -> bool:
    """Return whether two Rows are equal bit by bit."""
    return all((getattr(one, name) == getattr(two, name)).all() for name in ("ids", "logprobs", "actual", "tail"))


async def score_sample(pool: TeacherPool, cards: Sequence[TeacherCard], index: int, tally: Tally) -> None:
    """Send one sample to all teachers."""
    sequence, began = sequence_of(index), time.monotonic()
    responses = await asyncio.gather(
        *(pool.score(f"t{n}", sequence, 1, TOP_K, f"#{index}") for n in range(NUM_TEACHERS))
    )
    tally.seconds.append(time.monotonic() - began)
    for card, response in zip(cards, responses, strict=True):
        expected = as_received(rows_of(sequence, 1, TOP_K, card.vocab_size), sequence, card)
        tally.responses += 1
        tally.wrong += not same(response, expected)
    tally.samples += 1


async def keep_scoring(pool: TeacherPool, cards: Sequence[TeacherCard], indices: Iterator[int], until: float) -> Tally:
    """Keep AT_ONCE samples in flight until the time `until`, and finish all that were started."""
    tally = Tally()

    async def worker() -> None:
        while time.monotonic() < until:
            await score_sample(pool, cards, next(indices), tally)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return tally


async def inject_faults(
    teachers: Sequence[FaultyTeacher], rng: random.Random, until: float, done: Counter[str]
) -> None:
    """Inject faults into one teacher, at most two replicas at a time; all faults end before the function returns."""
    faulty: dict[FaultyTeacher, str] = {}

    async def inject(teacher: FaultyTeacher, kind: str) -> None:
        await asyncio.to_thread(begin, teacher, kind)
        await asyncio.sleep(rng.uniform(2, 8))
        await asyncio.to_thread(end, teacher, kind)
        del faulty[teacher]

    tasks = []
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(0.5, 4))
        kind = rng.choice(KINDS)
        free = [teacher for teacher in teachers if teacher not in faulty]
        if len(faulty) < NUM_REPLICAS - 1 and not (kind in INVALID_ROWS and set(INVALID_ROWS) & set(faulty.values())):
            teacher = rng.choice(free)
            faulty[teacher] = kind
            done[kind] += 1
            tasks.append(asyncio.create_task(inject(teacher, kind)))
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


async def measure(pools: Sequence[Sequence[FaultyTeacher]], seconds: float, seed: int) -> dict[str, float]:
    """Measure without faults, then with faults."""
    addresses = [TeacherAddress(f"t{n}", tuple(t.url for t in replicas)) for n, replicas in enumerate(pools)]
    indices, kinds = itertools.count(), Counter[str]()
    async with TeacherPool(addresses) as pool:
        cards = [(await pool.connect(address.name))[0] for address in addresses]
        calm = await keep_scoring(pool, cards, indices, time.monotonic() + CALM_S)
        before = pool.stats()
        began = time.monotonic()
        until = began + seconds
        async with asyncio.TaskGroup() as group:
            scoring = group.create_task(keep_scoring(pool, cards, indices, until))
            for n, replicas in enumerate(pools):
                group.create_task(inject_faults(replicas, random.Random(seed + n), until, kinds))
        chaos = scoring.result()
        took = time.monotonic() - began
        after = pool.stats()
    counts = {
        name: sum(getattr(after[k], name) - getattr(before[k], name) for k in after)
        for name in ("requests", "retries", "hedged", "rejected")
    }
    rates = calm.samples / CALM_S, chaos.samples / seconds
    return {
        "chaos_seconds": took,
        "chaos_samples": chaos.samples,
        "chaos_responses": chaos.responses,
        "chaos_missing": chaos.samples * NUM_TEACHERS - counts["requests"],
        "chaos_wrong": calm.wrong + chaos.wrong,
        **{f"chaos_{name}": value for name, value in counts.items()},
        **{f"chaos_fault_{kind}": kinds[kind] for kind in KINDS},
        "chaos_calm_samples_per_s": rates[0],
        "chaos_samples_per_s": rates[1],
        "chaos_time_lost_s": seconds * (1 - rates[1] / rates[0]),
        **{f"chaos_calm_{name}": value for name, value in latencies(calm).items()},
        **{f"chaos_{name}": value for name, value in latencies(chaos).items()},
    }


def latencies(tally: Tally) -> dict[str, float]:
    hundredths = statistics.quantiles(tally.seconds, n=100)
    return {"p50_s": hundredths[49], "p99_s": hundredths[98], "longest_s": max(tally.seconds)}


def table(figures: dict[str, float]) -> str:
    return "".join(f"{name.removeprefix('chaos_'):<24}{value:>12,.4g}\n" for name, value in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    logging.getLogger("tutelage.pool").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = save_tiny_model(Path(folder) / "model", kind="byte_level", seed=1)
        pools = [stack.enter_context(faulty_teachers(model, NUM_REPLICAS, DELAY_S)) for _ in range(NUM_TEACHERS)]
        figures = asyncio.run(measure(pools, arguments.seconds, arguments.seed))
    sys.stdout.write(table(figures))
    if arguments.json:
        kept = {name: round(value, 4) for name, value in figures.items()}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(1 if figures["chaos_wrong"] or figures["chaos_missing"] else 0)


if __name__ == "__main__":
    main()
