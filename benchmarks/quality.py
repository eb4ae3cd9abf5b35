"""Does it teach? Students with and without teachers, on the same tokens in the same order, several seeds.

`python -m benchmarks.quality [SETTING ...] [--arms PATTERN ...] [--seeds 3] [--out DIR] [--show] [--json FILE]`

A setting is a student and how much text it gets; an arm is who teaches it and how. The text is docstrings of pinned
packages, the teachers SmolLM2-135M and Gemma 3 270M (made by `tutelage demo --prepare`), served and asked as in any
run; their answers are remembered in memory, so that a text is scored once for all arms. A seed decides the windows,
their order and what is held out: arms of one seed are compared with each other.

Every run is one of `tutelage train`, in DIR/SETTING/ARM/SEED. What is finished there is not run again: begin anew with
the same command, or add arms, settings and seeds to what is there. Of a run its metrics.jsonl stays.

Each figure is a mean over seeds, ± half the range between them.

before, end, best  bits per byte of held-out text
gain               plain's best minus the arm's best, the same seed
tokens             until the arm is as good as plain at its best, over what plain needed, on straight lines between
                   measurements; "never" if a seed never was. FuseLLM's is 1/3.9 = 0.26
"""

import argparse
import itertools
import json
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.drawing import svg
from benchmarks.processes import server_process
from benchmarks.remembered import run_teacher
from benchmarks.texts import save_docstrings
from trainer.config import RunConfig
from trainer.errors import MetricsError
from trainer.loop import train
from trainer.places import cache_dir, find_model
from trainer.reports.curves import Curve
from trainer.reports.history import History, read_history

MODELS = {"smollm2": "smollm2-135m-instruct", "gemma": "gemma-3-270m"}
BASE = "smollm2-135m-instruct"
CUT_LAYERS = (0, 1, 2, 3, 4, 5, 28, 29)  # of 30: the first read, the last write
PLAIN = "plain"
HELD_OUT = 24  # documents, of each the first window
COLUMNS = ("before", "end", "best", "gain", "tokens")
Values = Mapping[str, Any]  # of a run file: {"loss.ce_weight": 0.1}


@dataclass(frozen=True)
class Setting:
    """student: base, cut (fewer layers of it) or random (17.7M parameters); values: of the run file."""

    student: str
    windows: int
    epochs: int
    values: Values


@dataclass(frozen=True)
class Arm:
    """What differs from Tutelage's defaults; no teachers is plain training.

    values: of the run file, after the setting's;
    of_teachers: keys of each [[teachers]]; lr: what the setting's learning rate is multiplied by.
    """

    values: Values = field(default_factory=dict)
    teachers: tuple[str, ...] = ()
    of_teachers: Values = field(default_factory=dict)
    lr: float = 1.0


UPPER = {"student.train_layers": 8, "optim.warmup_steps": 4, "optim.lr": 5e-4}
RANDOM = {"optim.lr": 2e-3, "optim.warmup_steps": 20}
SETTINGS = {
    "base-scarce": Setting("base", 16, 10, UPPER),
    "base-scarce-2x": Setting("base", 32, 5, UPPER),  # how much more text is worth as much as teachers
    "base-scarce-4x": Setting("base", 64, 3, UPPER),
    "base-once": Setting("base", 160, 1, UPPER | {"optim.lr": 1e-4}),
    "lora-scarce": Setting("base", 16, 10, {"student.lora.rank": 16, "optim.lr": 1e-3, "optim.warmup_steps": 4}),
    "cut-once": Setting("cut", 320, 1, {"optim.lr": 5e-4, "optim.warmup_steps": 10}),
    "random-once": Setting("random", 400, 1, RANDOM),
    "random-scarce": Setting("random", 40, 10, RANDOM),
    "random-scarce-2x": Setting("random", 80, 5, RANDOM),
    "random-scarce-4x": Setting("random", 160, 4, RANDOM),
}
BOTH = tuple(MODELS)
LAMBDA = "loss.ce_weight"
ARMS = {
    PLAIN: Arm({LAMBDA: 1.0}),
    "smollm2": Arm(teachers=("smollm2",)),
    "gemma": Arm(teachers=("gemma",)),
    **{
        name: Arm({"fusion.method": name}, BOTH)
        for name in ("mean", "geometric", "min_ce", "avg_ce", "confidence", "adaptive")
    },
    "min_ce-by-token": Arm({"fusion.method": "min_ce", "fusion.scope": "token"}, BOTH),
    **{
        f"fusellm-{match}": Arm({LAMBDA: 0.9, "fusion.method": "fusellm_min_ce"}, BOTH, {"match": match})
        for match in ("em", "min_ed")
    },
    **{f"mean-λ{weight:g}": Arm({LAMBDA: weight}, BOTH) for weight in (0, 0.1, 0.5, 0.9)},
    **{
        f"mean-λ{first:g}→0": Arm({LAMBDA: first, "loss.final_ce_weight": 0.0, "loss.schedule": "linear"}, BOTH)
        for first in (0.9, 0.5)
    },
    **{f"mean-K{k}": Arm({"fusion.top_k": k}, BOTH, {"top_k": k}) for k in (1, 8)},
    **{f"mean-T{t:g}": Arm({"loss.temperature": t}, BOTH) for t in (0.7, 1.5)},
    **{
        f"mean-{name}": Arm({"loss.divergence": name}, BOTH)
        for name in ("reverse_kl", "jensen_shannon", "skew_kl", "total_variation")
    },
    **{f"plain-lr×{x:g}": Arm({LAMBDA: 1.0}, lr=x) for x in (0.3, 3)},
    **{f"mean-lr×{x:g}": Arm(teachers=BOTH, lr=x) for x in (0.3, 3)},
}
DRAWN = (PLAIN, "smollm2", "gemma", "mean", "mean-λ0", "mean-λ0.1", "mean-λ0.5", "fusellm-min_ed")  # of the figures


@dataclass(frozen=True)
class Place:
    """Where things lie, and on what they run."""

    out: Path
    text: Path
    device: str

    def run(self, setting: str, arm: str, seed: int) -> Path:
        return self.out / setting / arm / str(seed)

    def student(self, kind: str, seed: int) -> Path:
        """The student's model directory, made unless it is there; random weights by the seed."""
        if kind == "base":
            return find_model(BASE)
        folder = self.out / "students" / (f"{kind}-{seed}" if kind == "random" else kind)
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}")
            save_student(kind, seed, partial)
            partial.rename(folder)
        return folder


def save_student(kind: str, seed: int, folder: Path) -> None:
    base = find_model(BASE)
    model: Any
    if kind == "cut":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in CUT_LAYERS)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        model.config.num_hidden_layers = len(CUT_LAYERS)
        model.config.layer_types = None
    else:
        torch.manual_seed(seed)
        known = AutoModelForCausalLM.from_pretrained(base).config
        shape = LlamaConfig(
            vocab_size=known.vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)


def config_of(place: Place, names: tuple[str, str, int], urls: Mapping[str, str]) -> RunConfig:
    """The run file of one (setting, arm, seed)."""
    setting, arm, seed = SETTINGS[names[0]], ARMS[names[1]], names[2]
    steps = setting.windows * setting.epochs // 4
    raw: dict[str, Any] = {
        "student": {"model": str(place.student(setting.student, seed)), "device": place.device},
        "data": {"window_tokens": 230, "max_windows_per_document": 1, "max_samples": setting.windows},
        "teachers": [{"name": name, "urls": [urls[name]], **arm.of_teachers} for name in arm.teachers],
        "train": {"epochs": setting.epochs, "batch_samples": 4, "seed": seed},
        "eval": {"held_out_documents": HELD_OUT, "every_steps": max(steps // 10, 1)},
        "output": {"dir": str(place.run(*names))},
    }
    raw["data"]["sources"] = [{"files": [str(place.text)], "domain_column": "domain"}]
    for key, value in [*setting.values.items(), *arm.values.items()]:
        put(raw, key, value)
    raw["optim"]["lr"] *= arm.lr
    return RunConfig.model_validate(raw)


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one value by its dotted key."""
    *path, last = key.split(".")
    for part in path:
        raw = raw.setdefault(part, {})
    raw[last] = value


def finished(folder: Path) -> History | None:
    """What came of a run, None if it did not come to its end."""
    try:
        history = read_history(folder)
    except MetricsError:
        return None
    return history if history.finished else None


def run_all(place: Place, wanted: Sequence[tuple[str, str, int]]) -> None:
    """Every run that is not finished. What was begun is begun anew."""
    missing = [names for names in wanted if finished(place.run(*names)) is None]
    if not missing:
        return
    needed = {teacher for _, arm, _ in missing for teacher in ARMS[arm].teachers}
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(server_process(run_teacher, find_model(MODELS[name]), place.device))
            for name in sorted(needed)
        }
        for number, names in enumerate(missing):
            sys.stderr.write(f"{number + 1} of {len(missing)}: {' '.join(map(str, names))}\n")
            folder = place.run(*names)
            shutil.rmtree(folder, ignore_errors=True)
            if train(config_of(place, names, urls)).told_to_end:
                raise SystemExit(128 + signal.SIGTERM)
            shutil.rmtree(folder / "checkpoints")
            shutil.rmtree(folder / "model")


@dataclass(frozen=True)
class Figures:
    """One arm of a setting, by seed. tokens is None where the arm never was as good as plain at its best."""

    before: tuple[float, ...]
    end: tuple[float, ...]
    best: tuple[float, ...]
    gain: tuple[float, ...]
    tokens: tuple[float | None, ...]


def figures_of(place: Place, setting: str, arm: str, seeds: Sequence[int]) -> Figures | None:
    """What is finished of an arm, where plain is finished too."""
    rows = []
    for seed in seeds:
        run, plain = (finished(place.run(setting, name, seed)) for name in (arm, PLAIN))
        if run is None or plain is None:
            continue
        bpb, plain_bpb = run.evals.columns["held_out_bpb"], plain.evals.columns["held_out_bpb"]
        needed, reached = (tokens_to(r, plain_bpb.min()) for r in (plain, run))
        ratio = reached / needed if needed and reached is not None else None  # no goal where plain never was better
        rows.append((bpb[0], bpb[-1], bpb.min(), plain_bpb.min() - bpb.min(), ratio))
    return Figures(*zip(*rows, strict=True)) if rows else None


def tokens_to(run: History, bpb: float) -> float | None:
    """Tokens until held-out text first costs `bpb`, on straight lines between measurements; None if it never does."""
    tokens, measured = run.tokens_at(run.evals.steps), run.evals.columns["held_out_bpb"]
    below = np.flatnonzero(measured <= bpb)
    if tokens is None or not len(below):
        return None
    last = below[0]
    around = [last, max(last - 1, 0)]
    return float(np.interp(bpb, measured[around], tokens[around]))


def flat(place: Place, seeds: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Everything that is finished, as {name: number}."""
    for setting in SETTINGS:
        for arm in ARMS:
            found = figures_of(place, setting, arm, seeds)
            if found is None:
                continue
            name = f"{setting}_{arm}"
            yield f"{name}_seeds", len(found.end)
            for column in COLUMNS:
                values = [value for value in getattr(found, column) if value is not None]
                if len(values) == len(found.end):
                    yield f"{name}_{column}", round(statistics.mean(values), 5)
                    yield f"{name}_{column}_spread", round((max(values) - min(values)) / 2, 5)


def with_known(figures: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """All arms of both: an arm's figures are from where it has more seeds, from here if as many."""
    joined: dict[str, float] = {}
    for setting, arm in itertools.product(SETTINGS, ARMS):
        name = f"{setting}_{arm}"
        source = figures if figures.get(f"{name}_seeds", 0) >= known.get(f"{name}_seeds", 0) else known
        names = [f"{name}_seeds", *(f"{name}_{column}{end}" for column in COLUMNS for end in ("", "_spread"))]
        joined |= {each: source[each] for each in names if each in source}
    return joined


def curves(place: Place, setting: str, seeds: Sequence[int]) -> Iterator[Curve]:
    """Held-out bits per byte against tokens, each drawn arm's mean over the seeds that all of these have finished."""
    runs = {arm: {seed: run for seed in seeds if (run := finished(place.run(setting, arm, seed)))} for arm in DRAWN}
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    common = sorted(set(seeds).intersection(*runs.values()))
    for number, (arm, by_seed) in enumerate(runs.items() if common else ()):
        first = by_seed[common[0]]
        tokens = first.tokens_at(first.evals.steps)
        assert tokens is not None
        bpb = np.mean([by_seed[seed].evals.columns["held_out_bpb"] for seed in common], axis=0)
        yield Curve(arm, tokens, bpb, None if arm == PLAIN else number)


def table(figures: Mapping[str, float]) -> str:
    """A paragraph a setting, a line an arm."""
    lines = []
    for setting in SETTINGS:
        arms = [arm for arm in ARMS if f"{setting}_{arm}_seeds" in figures]
        if arms:
            lines.append(f"\n{setting:<20} seeds   before  end              best             gain               tokens")
        for arm in arms:
            name = f"{setting}_{arm}"
            end, best, gain, tokens = (
                f"{figures[f'{name}_{column}']:{form}} ± {figures[f'{name}_{column}_spread']:{form.strip('+')}}"
                if f"{name}_{column}" in figures
                else "never"
                for column, form in (("end", ".4f"), ("best", ".4f"), ("gain", "+.4f"), ("tokens", ".2f"))
            )
            before = f"{figures[f'{name}_before']:.4f}"
            lines.append(f"{arm:<20} {figures[f'{name}_seeds']:>5} {before:>8}  {end}  {best}  {gain}  {tokens}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all if none is given")
    parser.add_argument("--arms", nargs="+", default=["*"], help="by name, with * and ?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=cache_dir() / "quality")
    parser.add_argument("--device", default="cpu", help="of student and teachers")
    parser.add_argument("--show", action="store_true", help="run nothing: what is finished already")
    parser.add_argument("--json", type=Path, help="write {name: number} of what is finished, here or in it")
    parser.add_argument("--curves", type=Path, help="folder for a figure of each setting")
    arguments = parser.parse_args()
    place = Place(arguments.out, save_docstrings(arguments.out / "docstrings.jsonl"), arguments.device)
    arms = [arm for arm in ARMS if arm == PLAIN or any(fnmatch(arm, pattern) for pattern in arguments.arms)]
    seeds = range(arguments.seeds)
    settings = arguments.settings or list(SETTINGS)
    if not arguments.show:
        run_all(place, [(setting, arm, seed) for setting in settings for seed in seeds for arm in arms])
    figures = dict(flat(place, seeds))
    sys.stdout.write(table(figures))
    for setting in SETTINGS if arguments.curves else ():
        drawn = list(curves(place, setting, seeds))
        if len(drawn) > 1:
            late = max(float(curve.y[len(curve.y) // 5 :].max()) for curve in drawn)  # not what all fall from at first
            top = min(float(drawn[0].y[0]), late)
            page = svg(f"{setting}: held-out text", "bits per byte, tokens trained on", drawn, top)
            (arguments.curves / f"quality-{setting}.svg").write_text(page, encoding="utf-8")
    if arguments.json:
        known = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(with_known(figures, known), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
