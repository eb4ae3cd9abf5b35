"""What comes of a run: figures on held-out text, whether they still improve, and the exported student.

What was measured before a run was resumed is read from its metrics file, as far as it is resumed from.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from teachers.models import name_of
from trainer.config import RunConfig
from trainer.data.reading import Reader
from trainer.data.samples import Corpus
from trainer.learning.student import Student
from trainer.ranks import Ranks
from trainer.reports.history import FILE, read_history
from trainer.reports.metrics import Metrics
from trainer.reports.summary import measured
from trainer.results.agreement import Heard, agreement, fused_now, hear
from trainer.results.evaluate import evaluate_domains, figures, held_out_domains
from trainer.results.export import export_model, save_card
from trainer.results.model_card import model_card
from trainer.results.resumed import Start, changes, check_teachers
from trainer.targets.fuser import Fuser, check_routes

Exported = tuple[int, float | None] | None  # after which step, and its bits per byte of held-out text
CARD_FACTS = {"model", "revision", "fingerprint", "tokenizer_sha256", "vocab_size", "engine", "dtype"}
SOFTWARE = ("tutelage", "torch", "transformers")


class Outcome:
    """Made at the start of a run, after `done` of `num_steps` steps. Every rank has one and calls it alike.

    held_out  (step, bits per byte) since this start
    stalled   whether the run is to end because held-out text has not improved (eval.stop_after)
    """

    def __init__(
        self,
        config: RunConfig,
        student: Student,
        reader: Reader,
        corpus: Corpus,
        *,
        ranks: Ranks,
        done: int,
        num_steps: int,
    ) -> None:
        self._config = config
        self._student = student
        self._reader = reader
        self._corpus = corpus
        self._ranks = ranks
        self._num_steps = num_steps
        self._domains = held_out_domains(corpus, reader, config.data)
        self._heard = Heard({})
        self._out = Path(config.output.dir).expanduser()
        self.held_out: list[tuple[int, float]] = []
        earlier = _earlier(self._out, done) if ranks.first else ({}, None, {})
        self._all, self._exported, self._before = ranks.agreed(earlier)

    @property
    def stalled(self) -> bool:
        stop_after, margin = self._config.eval.stop_after, self._config.eval.stop_margin
        return stop_after is not None and since_better(list(self._all.values()), margin) >= stop_after

    def reason(self, step: int) -> str | None:
        """Why a run that ended after `step` steps ended before its last, in words."""
        if not self.stalled or step == self._num_steps:
            return None
        return f"held-out text has not improved in {self._config.eval.stop_after} measurements (eval.stop_after)"

    def hear_teachers(self) -> None:
        """Ask every teacher what it is and, for its agreement, about held-out samples.

        Raises their errors, and ConfigError for one that is another than it was.
        """
        if self._config.eval.agreement_samples:
            check_routes(self._corpus.held_out, self._config)
        heard = hear(self._config, self._reader, self._corpus.held_out) if self._ranks.first else Heard({})
        self._heard = self._ranks.agreed(heard)
        check_teachers(self._before, self._heard.cards)

    def facts(self) -> dict[str, Any]:
        """What the metrics file is told once: what is measured on, and what the model's card will name."""
        num_read = sum(map(len, self._domains.values()))
        name, revision = name_of(self._student.folder.absolute())
        return {
            "held_out": num_read,
            "held_out_skipped": len(self._corpus.held_out) - num_read,
            "base": {"model": name, "revision": revision},
            "changed": changes(self._before, self._config),
            "teachers": {who: card.model_dump(include=CARD_FACTS) for who, card in self._heard.cards.items()},
            "software": {"python": platform.python_version(), **{name: version(name) for name in SOFTWARE}},
        }

    def measure(self, metrics: Metrics, step: int, fusion_state: dict[str, Any] | None = None) -> None:
        """Say how good the student is after `step` steps, once, and export it if model/ is to hold the best.

        fusion_state is what the run's fusion has seen by then.
        """
        if not self._domains or (self.held_out and self.held_out[-1][0] == step):
            return
        values = figures(evaluate_domains(self._student, self._domains, self._config.loss.chunk_tokens, self._ranks))
        bpb = values["held_out_bpb"]
        metrics.emit("eval", step=step, **values, **self._agreement(step, fusion_state))
        self.held_out.append((step, bpb))
        self._all.setdefault(step, bpb)  # measured again where a run was resumed
        best = math.inf if self._exported is None or self._exported[1] is None else self._exported[1]
        if self._config.output.export == "best" and bpb < best:
            self._export(metrics, step)

    def _agreement(self, step: int, state: dict[str, Any] | None) -> Mapping[str, Any]:
        config, asked = self._config, self._heard.asked
        fuser = partial(Fuser, config, len(self._student.vocabulary), self._num_steps, state)
        fused = fused_now(fuser, asked, config.train.batch_samples, step)
        return agreement(config, self._student, asked, fused)

    def finish(self, metrics: Metrics, step: int) -> Path:
        """The folder model/, with the last weights or the best, and a card that tells the whole run."""
        folder = self._out / "model"
        if self._config.output.export == "last" or self._exported is None:
            self._export(metrics, step)
        elif self._ranks.first:
            save_card(model_card(read_history(self._out), *self._exported), folder)
        return folder

    def _export(self, metrics: Metrics, step: int) -> None:
        bpb, weights = self._all.get(step), self._student.weights()
        if self._ranks.first:
            card = model_card(read_history(self._out), step, bpb)
            export_model(self._student, weights, self._reader, self._out / "model", card)
        self._exported = step, bpb
        metrics.emit("export", step=step, held_out_bpb=bpb)


def _earlier(out: Path, done: int) -> tuple[dict[int, float], Exported, Start]:
    """What was measured up to `done`, by step, what model/ holds, and how it was started; nothing if it begins anew.

    What model/ holds may be from after `done`, of a run that was killed: it was as good as it says, and is replaced by
    better.
    """
    if not done or not (out / FILE).is_file():  # without a checkpoint nothing says that it was this student
        return {}, None, {}
    history = read_history(out)
    steps, bpb = measured(history) or (np.empty(0, int), np.empty(0))
    known = {step: value for step, value in zip(steps.tolist(), bpb.tolist(), strict=True) if step <= done}
    return known, history.exported if (out / "model").is_dir() else None, history.start


def since_better(bpb: Sequence[float], margin: float) -> int:
    """How many measurements ago the best one was; it is better only by more than `margin`."""
    best, ago = math.inf, 0
    for value in bpb:
        ago += 1
        if value < best - margin:
            best, ago = value, 0
    return ago
