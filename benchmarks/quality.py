"""Compare students trained with and without teachers, on the same tokens in the same order, over several seeds.

`python -m benchmarks.quality [SETTING ...] [--arms PATTERN ...] [--seeds 3] [--out DIR] [--show] [--json FILE]`

A setting is a student and an amount of text. An arm is a set of teachers and a method. The text consists of
docstrings of pinned packages. The teachers are SmolLM2-135M and Gemma 3 270M (written by `tutelage demo --prepare`),
served as in any run; their scores are cached in memory, so that a text is scored once for all arms. The seed determines
the windows, their order and the held-out text, so arms are compared for equal seeds.

Every run is a `tutelage train` in DIR/SETTING/ARM/SEED. Finished runs are not repeated: run the same command again
after an interruption, or add arms, settings and seeds. Only metrics.jsonl of a finished run is kept.

Each figure is the mean over the seeds, ± half of their range.

before, end, best  bits per byte of held-out text
gain               best of plain minus best of the arm, for the same seed
tokens             training tokens until the arm reaches the best of plain, divided by those that plain needs,
                   interpolated linearly between evaluations; "never" if some seed does not reach it. FuseLLM reports
                   1/3.9 = 0.26
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
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.drawing import svg
from benchmarks.processes import server_process
from benchmarks.quality_arms import ARMS, MODELS, PLAIN, SETTINGS
from benchmarks.remembered import run_teacher
from benchmarks.texts import save_docstrings
from trainer.config import RunConfig
from trainer.errors import MetricsError
from trainer.paths import cache_dir, resolve_model_dir
from trainer.report.history import History, read_history
from trainer.report.svg import Curve
from trainer.training.loop import train

BASE = "smollm2-135m-instruct"
CUT_LAYERS = (0, 1, 2, 3, 4, 5, 28, 29)  # of 30: the layers next to the embeddings and the head matter most
HELD_OUT = 24  # documents; only the first window of each
COLUMNS = ("before", "end", "best", "gain", "tokens")
# arms in the figures
DRAWN = (PLAIN, "smollm2", "gemma", "mean", "mean-λ0", "mean-λ0.1", "mean-λ0.5", "fusellm-min_ed")


@dataclass(frozen=True)
class Workspace:
    """Folder of the runs, file of the text, and device of student and teachers."""

    out: Path
    text: Path
    device: str

    def run(self, setting: str, arm: str, seed: int) -> Path:
        """Return the folder of one run."""
        return self.out / setting / arm / str(seed)

    def student(self, kind: str, seed: int) -> Path:
        """Return the model directory of the student, and create it if it is missing. Random weights use the seed."""
        if kind == "base":
            return resolve_model_dir(BASE)
        folder = self.out / "students" / (f"{kind}-{seed}" if kind == "random" else kind)
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}")
            save_student(kind, seed, partial)
            partial.rename(folder)
        return folder


def save_student(kind: str, seed: int, folder: Path) -> None:
    base = resolve_model_dir(BASE)
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
        base_config = AutoModelForCausalLM.from_pretrained(base).config
        shape = LlamaConfig(
            vocab_size=base_config.vocab_size,
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


def config_of(workspace: Workspace, names: tuple[str, str, int], urls: Mapping[str, str]) -> RunConfig:
    """Return the run config of one (setting, arm, seed)."""
    setting, arm, seed = SETTINGS[names[0]], ARMS[names[1]], names[2]
    steps = setting.windows * setting.epochs // 4
    raw: dict[str, Any] = {
        "student": {"model": str(workspace.student(setting.student, seed)), "device": workspace.device},
        "data": {"window_tokens": 230, "max_windows_per_document": 1, "max_samples": setting.windows},
        "teachers": [{"name": name, "urls": [urls[name]], **arm.teacher_values} for name in arm.teachers],
        "train": {"epochs": setting.epochs, "batch_samples": 4, "seed": seed},
        "eval": {"held_out_documents": HELD_OUT, "every_steps": max(steps // 10, 1)},
        "output": {"dir": str(workspace.run(*names))},
    }
    raw["data"]["sources"] = [{"files": [str(workspace.text)], "domain_column": "domain"}]
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
    """Return the history of a finished run, None if it is missing or incomplete."""
    try:
        history = read_history(folder)
    except MetricsError:
        return None
    return history if history.finished else None


def run_all(workspace: Workspace, wanted: Sequence[tuple[str, str, int]]) -> None:
    """Run every training that is not finished. An incomplete run starts again from step 0."""
    missing = [names for names in wanted if finished(workspace.run(*names)) is None]
    if not missing:
        return
    needed = {teacher for _, arm, _ in missing for teacher in ARMS[arm].teachers}
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(server_process(run_teacher, resolve_model_dir(MODELS[name]), workspace.device))
            for name in sorted(needed)
        }
        for number, names in enumerate(missing):
            sys.stderr.write(f"{number + 1} of {len(missing)}: {' '.join(map(str, names))}\n")
            folder = workspace.run(*names)
            shutil.rmtree(folder, ignore_errors=True)
            if train(config_of(workspace, names, urls)).terminated:
                raise SystemExit(128 + signal.SIGTERM)
            shutil.rmtree(folder / "checkpoints")
            shutil.rmtree(folder / "model")


@dataclass(frozen=True)
class Figures:
    """Figures of one arm by seed. tokens is None for a seed that does not reach the best of plain."""

    before: tuple[float, ...]
    end: tuple[float, ...]
    best: tuple[float, ...]
    gain: tuple[float, ...]
    tokens: tuple[float | None, ...]


def figures_of(workspace: Workspace, setting: str, arm: str, seeds: Sequence[int]) -> Figures | None:
    """Return the figures of the seeds for which the arm and plain are finished, None if there are none."""
    rows = []
    for seed in seeds:
        run, plain = (finished(workspace.run(setting, name, seed)) for name in (arm, PLAIN))
        if run is None or plain is None:
            continue
        bpb, plain_bpb = run.evals.columns["held_out_bpb"], plain.evals.columns["held_out_bpb"]
        needed, reached = (tokens_to(r, plain_bpb.min()) for r in (plain, run))
        ratio = reached / needed if needed and reached is not None else None  # None also if plain never improves
        rows.append((bpb[0], bpb[-1], bpb.min(), plain_bpb.min() - bpb.min(), ratio))
    return Figures(*zip(*rows, strict=True)) if rows else None


def tokens_to(run: History, bpb: float) -> float | None:
    """Return the training tokens until held-out text first has `bpb`, interpolated linearly; None if it never does."""
    tokens, measured = run.tokens_at(run.evals.steps), run.evals.columns["held_out_bpb"]
    below = np.flatnonzero(measured <= bpb)
    if tokens is None or not len(below):
        return None
    last = below[0]
    around = [last, max(last - 1, 0)]
    return float(np.interp(bpb, measured[around], tokens[around]))


def flat(workspace: Workspace, seeds: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Yield the name and value of every figure of the finished runs."""
    for setting in SETTINGS:
        for arm in ARMS:
            figures = figures_of(workspace, setting, arm, seeds)
            if figures is None:
                continue
            name = f"{setting}_{arm}"
            yield f"{name}_seeds", len(figures.end)
            for column in COLUMNS:
                values = [value for value in getattr(figures, column) if value is not None]
                if len(values) == len(figures.end):
                    yield f"{name}_{column}", round(statistics.mean(values), 5)
                    yield f"{name}_{column}_spread", round((max(values) - min(values)) / 2, 5)


def merged(figures: Mapping[str, float], stored: Mapping[str, float]) -> dict[str, float]:
    """Return the arms of both. The figures with more seeds are taken; `figures` if the numbers are equal."""
    joined: dict[str, float] = {}
    for setting, arm in itertools.product(SETTINGS, ARMS):
        name = f"{setting}_{arm}"
        source = figures if figures.get(f"{name}_seeds", 0) >= stored.get(f"{name}_seeds", 0) else stored
        names = [f"{name}_seeds", *(f"{name}_{column}{end}" for column in COLUMNS for end in ("", "_spread"))]
        joined |= {each: source[each] for each in names if each in source}
    return joined


def curves(workspace: Workspace, setting: str, seeds: Sequence[int]) -> Iterator[Curve]:
    """Yield mean held-out bits per byte by training tokens of each drawn arm, over the seeds finished by all."""
    runs = {arm: {seed: run for seed in seeds if (run := finished(workspace.run(setting, arm, seed)))} for arm in DRAWN}
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    common = sorted(set(seeds).intersection(*runs.values()))
    for number, (arm, by_seed) in enumerate(runs.items() if common else ()):
        first = by_seed[common[0]]
        tokens = first.tokens_at(first.evals.steps)
        assert tokens is not None
        bpb = np.mean([by_seed[seed].evals.columns["held_out_bpb"] for seed in common], axis=0)
        yield Curve(arm, tokens, bpb, None if arm == PLAIN else number)


def table(figures: Mapping[str, float]) -> str:
    """Format a paragraph per setting with a line per arm."""
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
    parser.add_argument("settings", nargs="*", help=f"{', '.join(SETTINGS)}; default: all")
    parser.add_argument("--arms", nargs="+", default=["*"], help="patterns of names, with * and ?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=cache_dir() / "quality")
    parser.add_argument("--device", default="cpu", help="device of student and teachers")
    parser.add_argument("--show", action="store_true", help="train nothing, show the finished runs")
    parser.add_argument("--json", type=Path, help="update {name: number} of the finished runs in this file")
    parser.add_argument("--curves", type=Path, help="write a figure of each setting to this folder")
    arguments = parser.parse_args()
    workspace = Workspace(arguments.out, save_docstrings(arguments.out / "docstrings.jsonl"), arguments.device)
    arms = [arm for arm in ARMS if arm == PLAIN or any(fnmatch(arm, pattern) for pattern in arguments.arms)]
    seeds = range(arguments.seeds)
    settings = arguments.settings or list(SETTINGS)
    if not arguments.show:
        run_all(workspace, [(setting, arm, seed) for setting in settings for seed in seeds for arm in arms])
    figures = dict(flat(workspace, seeds))
    sys.stdout.write(table(figures))
    for setting in SETTINGS if arguments.curves else ():
        drawn = list(curves(workspace, setting, seeds))
        if len(drawn) > 1:
            late = max(float(curve.y[len(curve.y) // 5 :].max()) for curve in drawn)  # leaves out the initial fall
            top = min(float(drawn[0].y[0]), late)
            page = svg(f"{setting}: held-out text", "bits per byte, tokens trained on", drawn, top)
            (arguments.curves / f"quality-{setting}.svg").write_text(page, encoding="utf-8")
    if arguments.json:
        stored = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(merged(figures, stored), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
