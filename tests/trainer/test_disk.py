"""What a run leaves on the disk, and what it writes on the way: of a teacher's answers, nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.trainer.runs import run_config, served_models, write_corpus
from trainer.config import RunConfig
from trainer.reports.metrics import read_metrics

EXPECTED = ("cache/alignment/", "cache/windows/", "out/checkpoints/", "out/model/", "out/metrics.jsonl")


def watched(config: RunConfig, room: Path) -> dict[str, int]:
    """Run it in a process whose every place to write is in `room`: each file seen there, and the most bytes it had.

    Seen every few milliseconds, so that what is written and deleted again is seen too.
    """
    places = {"HOME": "home", "TMPDIR": "tmp", "TUTELAGE_CACHE": "cache", "XDG_CACHE_HOME": "home"}
    for place in {*places.values(), "here"}:
        (room / place).mkdir()
    environment = os.environ | {key: str(room / place) for key, place in places.items()}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run_file = room.with_suffix(".json")
    run_file.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tests.trainer.rank_main", str(run_file), "--pause=0.1"]
    process = subprocess.Popen(command, cwd=room / "here", env=environment)
    seen: dict[str, int] = {}
    while (code := process.poll()) is None:
        look(room, seen)
        time.sleep(0.005)
    assert code == 0
    look(room, seen)
    return seen


def look(room: Path, seen: dict[str, int]) -> None:
    for folder, _, names in os.walk(room):
        for name in names:
            path = Path(folder, name)
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue
            known = str(path.relative_to(room)).replace(".partial-model", "model").replace(".partial-", "step-")
            seen[known] = max(seen.get(known, 0), size)


def files_in(room: Path) -> set[str]:
    left: dict[str, int] = {}
    look(room, left)
    return set(left)


def test_nothing_of_a_teachers_answer_is_written(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    """Two runs that differ in how much the teachers answer: at K = 16 eight times what it is at K = 2."""
    corpus = write_corpus(tmp_path)
    seen: dict[int, dict[str, int]] = {}
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        for top_k in (2, 16):
            room = tmp_path / f"room-{top_k:02}"
            room.mkdir()
            raw = run_config(tiny_byte_level, corpus, room / "out", urls).model_dump()
            raw["output"] |= {"checkpoint_every_steps": 2, "keep_checkpoints": 9}
            for teacher in raw["teachers"]:
                teacher["top_k"] = top_k
            seen[top_k] = watched(RunConfig.model_validate(raw), room)
            assert [name for name in seen[top_k] if not name.startswith(EXPECTED)] == []
    few, many = seen[2], seen[16]
    assert {name.partition("/")[2] for name in many if name.startswith("out/")} >= {"metrics.jsonl", "model/README.md"}
    steps = [e for e in read_metrics(tmp_path / "room-16" / "out" / "metrics.jsonl") if e["event"] == "step"]
    tokens = sum(step["tokens"] for step in steps)
    assert tokens > 1000
    both = few.keys() & many.keys()  # a name under which something is written may be seen in one run only
    assert files_in(tmp_path / "room-02") == files_in(tmp_path / "room-16") <= both
    left = files_in(tmp_path / "room-16")  # what is under way for a moment may be seen at any size
    grown = {name: many[name] - few[name] for name in left}
    assert sum(grown.values()) < 0.25 * tokens, (
        grown
    )  # digits of figures; a float16 for each further candidate would be 28 of a teacher
