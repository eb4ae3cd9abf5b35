"""The values of teachers in step events: their order, and the auxiliary loss of each teacher."""

from pathlib import Path
from typing import Any

from tests.trainer.runs import run_config, served_models, write_corpus
from trainer.config import RunConfig
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train
from trainer.training.plan import plan_step

SIGNALS = {"z": "uld", "m": "byte_chain", "a": "alm", "k": "uld"}  # not in alphabetical order
MODELS = {"z": 0, "m": 1, "a": 1, "k": 1}  # indices of the served models


def config_of(corpus: Path, out: Path, student: Path, urls: list[str], names: list[str]) -> RunConfig:
    raw = run_config(student, corpus, out, [urls[MODELS[name]] for name in names]).model_dump()
    for teacher, name in zip(raw["teachers"], names, strict=True):
        teacher |= {"name": name, "signal": SIGNALS[name]}
    return RunConfig.model_validate(raw)


def first_step(config: RunConfig) -> dict[str, Any]:
    train(config, stop_at=1)
    (step,) = [e for e in read_metrics(Path(config.output.dir) / "metrics.jsonl") if e["event"] == "step"]
    return dict(step)


def test_auxiliary_losses_have_the_order_of_the_run_file(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    """Each teacher has the same loss in either order, and its own one: that of a run without the other teachers."""
    corpus, steps = write_corpus(tmp_path), {}
    forward, backward = list(SIGNALS), list(reversed(SIGNALS))
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        for out, names in {"forward": forward, "backward": backward, "z": ["z"], "a": ["a"], "k": ["k"]}.items():
            config = config_of(corpus, tmp_path / out, tiny_byte_level, urls, names)
            steps[out] = first_step(config)
            assert list(steps[out]["teachers"]) == names
            assert [loss.name for loss in plan_step(config, 0, 6).auxiliary] == [n for n in names if n != "m"]
    losses = {
        out: {name: round(teacher["loss"], 5) for name, teacher in step["teachers"].items() if "loss" in teacher}
        for out, step in steps.items()
    }
    assert losses["forward"] == losses["backward"] == losses["z"] | losses["a"] | losses["k"]
    assert len(set(losses["forward"].values())) == 3
