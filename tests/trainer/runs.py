"""Configuration of a small training run: tiny student, tiny served teachers, a few documents of text."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from teachers.engines.transformers import TransformersEngine
from teachers.engines.transformers_options import TransformersOptions
from tests.serve import serving
from tests.tiny import TEXT
from trainer.config import RunConfig
from trainer.telemetry.jsonl import read_metrics


def write_corpus(folder: Path, documents: int = 10) -> Path:
    """Write a JSON Lines file of different documents: rotations of the lines of one page."""
    lines = TEXT.splitlines(keepends=True)
    path = folder / "corpus.jsonl"
    texts = ["".join(lines[n % len(lines) :] + lines[: n % len(lines)]) for n in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@contextmanager
def served_models(*folders: Path) -> Iterator[list[str]]:
    """Serve models as float32 teachers and yield their URLs."""
    with ExitStack() as stack:
        urls = []
        for folder in folders:
            engine = TransformersEngine(folder, TransformersOptions(dtype="float32"))
            stack.callback(engine.close)
            urls.append(stack.enter_context(serving(engine)))
        yield urls


def run_config(model: Path, corpus: Path, out: Path, urls: list[str], **sections: dict[str, Any]) -> RunConfig:
    """Build a run of six steps of four samples: two epochs of twelve samples.

    Each keyword is a section whose values replace the defaults; `source` is merged into the only data source.
    """
    raw: dict[str, Any] = {
        "student": {"model": str(model), "precision": "fp32"},
        "data": {
            "sources": [{"files": [str(corpus)]} | sections.pop("source", {})],
            "window_tokens": 60,
            "max_samples": 12,
        },
        "teachers": [
            {"name": f"t{i}", "urls": [url], "top_k": 16, "start_timeout_s": 0, "unavailable_timeout_s": 30}
            for i, url in enumerate(urls)
        ],
        "loss": {"ce_weight": 0.3 if urls else 1.0},
        "optim": {"lr": 3e-3},
        "train": {"epochs": 2, "batch_samples": 4},
        "eval": {"held_out_documents": 2, "max_samples": 4},
        "output": {"dir": str(out)},
    }
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return RunConfig.model_validate(raw)


def losses(out: Path) -> dict[int, float]:
    """Return the loss by step; for a step that was repeated after a resume, the last one."""
    return {e["step"]: e["loss"] for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"}


def held_out(out: Path) -> dict[int, float]:
    """Return the held-out bits per byte by step."""
    return {e["step"]: e["held_out_bpb"] for e in read_metrics(out / "metrics.jsonl") if e["event"] == "eval"}
