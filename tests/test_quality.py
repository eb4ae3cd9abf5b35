"""benchmarks/quality.py: its run configs, its text, its figures, and the cache of teacher scores."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import Workspace, config_of, figures_of, flat, merged, table
from benchmarks.quality_arms import ARMS, PLAIN, SETTINGS
from benchmarks.remembered import MAX_TOP_K, CachingEngine, top_candidates
from benchmarks.texts import SHARED_PARAGRAPH, SHORTEST, docstrings
from tests.rows import random_rows
from tests.serve import FormulaEngine
from tests.trainer.made_runs import EventFile

URLS = {"smollm2": "http://127.0.0.1:1", "gemma": "http://127.0.0.1:2"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for student in ("cut", "random-0"):
        (tmp_path / "students" / student).mkdir(parents=True)
    return Workspace(tmp_path, tmp_path / "text.jsonl", "cpu")


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_arm_of_every_setting_is_a_valid_run_config(workspace: Workspace, setting: str, smollm2: Path) -> None:
    for arm in ARMS:
        config = config_of(workspace, (setting, arm, 0), URLS)
        assert bool(config.teachers) == (config.loss.ce_weight < 1)
    plain, slow = (config_of(workspace, (setting, arm, 0), URLS) for arm in (PLAIN, "plain-lr×0.3"))
    assert slow.optim.lr == pytest.approx(0.3 * plain.optim.lr)
    assert {t.signal for t in config_of(workspace, (setting, "fusellm-em", 0), URLS).teachers} == {"em"}


def test_figures_compare_arms_of_one_seed(workspace: Workspace) -> None:
    measured = {PLAIN: [2.0, 1.5, 1.4, 1.6], "mean": [2.0, 1.3, 1.2, 1.1]}
    for arm, bpb in measured.items():
        folder = workspace.run("base-scarce", arm, 0)
        folder.mkdir(parents=True)
        with EventFile(folder / "metrics.jsonl") as file:
            file.write("start", step=0, steps=3, run={})
            for step, value in enumerate(bpb):
                if step:
                    file.write("step", step=step, tokens=100)
                file.write("eval", step=step, held_out_bpb=value)
            file.write("end", step=3, model=None)
    figures = figures_of(workspace, "base-scarce", "mean", range(3))
    assert figures is not None
    assert (figures.before, figures.end, figures.best) == ((2.0,), (1.1,), (1.1,))
    assert list(figures.gain) == pytest.approx([0.3])
    # the arm has 1.3 after 100 tokens; plain reaches its best, 1.4, after 200 tokens
    assert figures.tokens == pytest.approx((0.6 / 0.7 / 2,))
    assert figures_of(workspace, "base-scarce", "gemma", range(3)) is None
    flattened = dict(flat(workspace, range(3)))
    assert flattened["base-scarce_mean_seeds"] == 1
    assert "mean" in table(flattened)


def test_figures_with_more_seeds_are_kept() -> None:
    stored = {"base-scarce_plain_seeds": 3, "base-scarce_plain_end": 1.0, "base-scarce_mean_seeds": 1}
    new = {"base-scarce_plain_seeds": 2, "base-scarce_plain_end": 2.0, "base-scarce_plain_end_spread": 0.1}
    new |= {"base-scarce_mean_seeds": 1, "base-scarce_mean_end": 3.0}
    assert merged(new, stored) == stored | {"base-scarce_mean_end": 3.0}


@pytest.mark.slow
def test_texts_share_no_long_paragraph_and_are_reproducible() -> None:
    texts = list(docstrings("networkx", set()))
    assert len(texts) > 300
    assert min(len(text) for _, text in texts) >= SHORTEST - 200  # SHORTEST counts the indentation, which is removed
    assert json.dumps(texts) == json.dumps(list(docstrings("networkx", set())))
    others = docstrings("networkx", {p for _, text in texts for p in text.split("\n\n")})
    assert max(len(p) for _, text in others for p in text.split("\n\n")) < SHARED_PARAGRAPH


def test_scores_are_cached_and_removed_candidates_are_added_to_the_tail(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    teacher = CachingEngine(engine)

    async def score() -> None:
        whole, few = await teacher.score([1, 2, 3], 1, MAX_TOP_K), await teacher.score([1, 2, 3], 1, 4)
        assert np.array_equal(few.ids, whole.ids[:, :4])
        await teacher.score([1, 2, 4], 1, 4)

    asyncio.run(score())
    assert engine.num_requests == 2
    rows = random_rows(np.arange(5), 200, 16, seed=0)
    cut = top_candidates(rows, 3)
    for one in (rows, cut):
        np.testing.assert_allclose(np.exp(one.logprobs).sum(1) + one.tail, 1, atol=1e-5)
