"""The parts of benchmarks/quality.py: its run files, its text, and teachers that are asked once."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import ARMS, PLAIN, SETTINGS, Place, config_of, figures_of, flat, table, with_known
from benchmarks.remembered import MOST_TOP_K, Remembering, likeliest
from benchmarks.texts import SHARED_PARAGRAPH, SHORTEST, docstrings
from tests.rows import random_rows
from tests.serve import FormulaEngine
from trainer.reports.metrics import Metrics

URLS = {"smollm2": "http://127.0.0.1:1", "gemma": "http://127.0.0.1:2"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for student in ("cut", "random-0"):
        (tmp_path / "students" / student).mkdir(parents=True)
    return Place(tmp_path, tmp_path / "text.jsonl", "cpu")


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_arm_of_every_setting_is_a_run_file(place: Place, setting: str, smollm2: Path) -> None:
    for arm in ARMS:
        config = config_of(place, (setting, arm, 0), URLS)
        assert bool(config.teachers) == (config.loss.ce_weight < 1)
    plain, slow = (config_of(place, (setting, arm, 0), URLS) for arm in (PLAIN, "plain-lr×0.3"))
    assert slow.optim.lr == pytest.approx(0.3 * plain.optim.lr)
    assert {t.match for t in config_of(place, (setting, "fusellm-em", 0), URLS).teachers} == {"em"}


def test_figures_compare_arms_of_one_seed(place: Place) -> None:
    measured = {PLAIN: [2.0, 1.5, 1.4, 1.6], "mean": [2.0, 1.3, 1.2, 1.1]}
    for arm, bpb in measured.items():
        folder = place.run("base-scarce", arm, 0)
        folder.mkdir(parents=True)
        with Metrics(folder / "metrics.jsonl") as metrics:
            metrics.emit("start", step=0, steps=3, run={})
            for step, value in enumerate(bpb):
                if step:
                    metrics.emit("step", step=step, tokens=100)
                metrics.emit("eval", step=step, held_out_bpb=value)
            metrics.emit("end", step=3, model=None)
    found = figures_of(place, "base-scarce", "mean", range(3))
    assert found is not None
    assert (found.before, found.end, found.best) == ((2.0,), (1.1,), (1.1,))
    assert list(found.gain) == pytest.approx([0.3])
    assert found.tokens == pytest.approx((0.6 / 0.7 / 2,))  # 1.3 after 100 tokens, plain's best 1.4 after 200
    assert figures_of(place, "base-scarce", "gemma", range(3)) is None
    figures = dict(flat(place, range(3)))
    assert figures["base-scarce_mean_seeds"] == 1
    assert "mean" in table(figures)


def test_an_arm_that_has_more_seeds_elsewhere_keeps_its_figures() -> None:
    known = {"base-scarce_plain_seeds": 3, "base-scarce_plain_end": 1.0, "base-scarce_mean_seeds": 1}
    here = {"base-scarce_plain_seeds": 2, "base-scarce_plain_end": 2.0, "base-scarce_plain_end_spread": 0.1}
    here |= {"base-scarce_mean_seeds": 1, "base-scarce_mean_end": 3.0}
    assert with_known(here, known) == known | {"base-scarce_mean_end": 3.0}


def test_texts_share_no_long_paragraph_and_are_the_same_each_time() -> None:
    found = list(docstrings("networkx", set()))
    assert len(found) > 300
    assert min(len(text) for _, text in found) >= SHORTEST - 200  # indentation is taken away
    assert json.dumps(found) == json.dumps(list(docstrings("networkx", set())))
    again = docstrings("networkx", {p for _, text in found for p in text.split("\n\n")})
    assert max(len(p) for _, text in again for p in text.split("\n\n")) < SHARED_PARAGRAPH


def test_an_answer_is_asked_for_once_and_cut_with_its_tail(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    teacher = Remembering(engine)

    async def ask() -> None:
        whole, few = await teacher.score([1, 2, 3], 1, MOST_TOP_K), await teacher.score([1, 2, 3], 1, 4)
        assert np.array_equal(few.ids, whole.ids[:, :4])
        await teacher.score([1, 2, 4], 1, 4)

    asyncio.run(ask())
    assert engine.asked == 2
    rows = random_rows(np.arange(5), 200, 16, seed=0)
    cut = likeliest(rows, 3)
    for one in (rows, cut):
        np.testing.assert_allclose(np.exp(one.logprobs).sum(1) + one.tail, 1, atol=1e-5)
