"""Files that a run writes: teacher scores are never written to disk."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.runs import run_config, served_models, write_corpus
from trainer.config import RunConfig
from trainer.telemetry.jsonl import read_metrics

pytestmark = pytest.mark.slow

EXPECTED = (
    *("cache/alignment/", "cache/windows/", "cache/tokenizer-files/", "tmp/tutelage-tokenizer-"),
    *("out/checkpoints/", "out/model/", "out/metrics.jsonl", "out/.lock"),
)
PROBE_BYTES = 4  # tempfile tests a temporary directory by a file with a random name and 4 bytes


def files_written(config: RunConfig, folder: Path) -> dict[str, int]:
    """Train in a process that can only write below `folder`; return the largest size of each file in bytes.

    The folder is listed every few milliseconds, to observe temporary files too.
    """
    directories = {"HOME": "home", "TMPDIR": "tmp", "TUTELAGE_CACHE": "cache", "XDG_CACHE_HOME": "home"}
    for name in {*directories.values(), "cwd"}:
        (folder / name).mkdir()
    environment = os.environ | {key: str(folder / name) for key, name in directories.items()}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run_file = folder.with_suffix(".json")
    run_file.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tests.trainer.run_rank", str(run_file), "--pause=0.1"]
    process = subprocess.Popen(command, cwd=folder / "cwd", env=environment)
    sizes: dict[str, int] = {}
    while (code := process.poll()) is None:
        record_sizes(folder, sizes)
        time.sleep(0.005)
    assert code == 0
    record_sizes(folder, sizes)
    return sizes


def record_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Update the largest size of every file below `folder`; a partial folder counts as the final one."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue
            final_name = str(path.relative_to(folder)).replace(".partial-model", "model").replace(".partial-", "step-")
            sizes[final_name] = max(sizes.get(final_name, 0), size)


def files_in(folder: Path) -> set[str]:
    sizes: dict[str, int] = {}
    record_sizes(folder, sizes)
    return set(sizes)


def test_teacher_scores_are_not_written_to_disk(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    """The files of runs with K = 2 and K = 16 have almost equal sizes, although the scores are eight times as large."""
    corpus = write_corpus(tmp_path)
    written: dict[int, dict[str, int]] = {}
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        for top_k in (2, 16):
            folder = tmp_path / f"top-{top_k:02}"
            folder.mkdir()
            raw = run_config(tiny_byte_level, corpus, folder / "out", urls).model_dump()
            raw["output"] |= {"checkpoint_every_steps": 2, "keep_checkpoints": 9}
            for teacher in raw["teachers"]:
                teacher["top_k"] = top_k
            written[top_k] = files_written(RunConfig.model_validate(raw), folder)
            sizes = {name: size for name, size in written[top_k].items() if not name.startswith(EXPECTED)}
            assert [name for name, size in sizes.items() if size > PROBE_BYTES] == []
    few, many = written[2], written[16]
    assert {name.partition("/")[2] for name in many if name.startswith("out/")} >= {"metrics.jsonl", "model/README.md"}
    steps = [e for e in read_metrics(tmp_path / "top-16" / "out" / "metrics.jsonl") if e["event"] == "step"]
    tokens = sum(step["tokens"] for step in steps)
    assert tokens > 1000
    both = few.keys() & many.keys()  # a temporary file may be observed in one run only
    assert files_in(tmp_path / "top-02") == files_in(tmp_path / "top-16") <= both
    final = files_in(tmp_path / "top-16")  # a temporary file may be observed at any size
    growth = {name: many[name] - few[name] for name in final}
    # Digits of metrics may differ. One float16 per additional candidate would be 28 bytes per token and teacher.
    assert sum(growth.values()) < 0.25 * tokens, growth
