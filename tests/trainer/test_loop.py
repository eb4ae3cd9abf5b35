"""Whole training runs of a tiny student with tiny served teachers."""

import asyncio
import math
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from transformers import AutoModelForCausalLM

from alignment import Vocabulary
from teachers.protocol.errors import FingerprintMismatch, Rejected, Unavailable
from teachers.protocol.rows import Rows
from tests.serve import FormulaEngine, free_port, serving
from tests.tiny import TEXT, save_tiny_model
from tests.trainer.runs import held_out, losses, run_config, served_models, write_corpus
from trainer.config import RunConfig
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError, DataError, NonFiniteLoss
from trainer.evaluation.bits_per_byte import Evaluation, evaluate
from trainer.fusion.run_fuser import Fuser
from trainer.query.connect import connect_teachers
from trainer.query.score import SampleScorer
from trainer.records import Sample, ScoredSample
from trainer.student.loading import load_student
from trainer.student.model import Student
from trainer.telemetry.collector import Collector
from trainer.telemetry.jsonl import EventRecord, read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.config import OptimConfig
from trainer.training.loop import train
from trainer.training.optimizer import learning_rate
from trainer.training.plan import plan_step
from trainer.training.run import begin
from trainer.training.step import StepResult, train_step


def test_a_student_learns_from_two_teachers_with_different_tokenizers(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, device: str
) -> None:
    sections: dict[str, Any] = {"student": {"device": device}, "train": {"epochs": 8}}
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, **sections)
        result = train(config)
    assert result.steps == 24
    assert result.held_out[-1][1] < result.held_out[0][1] - 0.1
    steps = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for name in ("t0", "t1"):
        assert steps[0]["teachers"][name]["weight"] == pytest.approx(0.5, abs=0.02)
        assert 0 < steps[0]["teachers"][name]["mass"] < 1
    assert steps[0]["coverage"] == 1


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_run(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, device: str
) -> None:
    corpus = write_corpus(tmp_path)
    sections: dict[str, Any] = {"student": {"device": device}, "eval": {"every_steps": 1}}
    with served_models(tiny_sentencepiece) as urls:
        uninterrupted, resumed = (
            run_config(tiny_byte_level, corpus, tmp_path / name, urls, **sections)
            for name in ("uninterrupted", "resumed")
        )
        train(uninterrupted)
        assert train(resumed, stop_at=3).model is None
        assert train(resumed, resume=True).steps == 6
    one, two = losses(tmp_path / "uninterrupted"), losses(tmp_path / "resumed")
    assert one.keys() == two.keys() == set(range(1, 7))
    assert [two[n] for n in one] == pytest.approx(list(one.values()), abs=1e-6)
    assert held_out(tmp_path / "resumed")[6] == pytest.approx(held_out(tmp_path / "uninterrupted")[6], abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_losses_on_gpu_and_cpu_are_equal(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, divergence: str
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        for device in ("cpu", "cuda"):
            sections: dict[str, Any] = {"student": {"device": device}, "loss": {"divergence": divergence}}
            train(run_config(tiny_byte_level, corpus, tmp_path / device, urls, **sections))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-4)
    assert held_out(tmp_path / "cuda") == pytest.approx(held_out(tmp_path / "cpu"), abs=1e-4)


def two_sources(folder: Path, model: Path, out: str, weight: float = 0.5) -> RunConfig:
    """Return a run of two sources whose epochs are not a multiple of the batch size."""
    raw = run_config(model, write_corpus(folder), folder / out, []).model_dump()
    (folder / "more.txt").write_text(TEXT[::-1], encoding="utf-8")
    raw["data"]["sources"] = [raw["data"]["sources"][0] | {"weight": weight}, {"files": [str(folder / "more.txt")]}]
    raw["data"]["max_samples"] = None
    raw["train"]["batch_samples"] = 5
    return RunConfig.model_validate(raw)


def test_a_run_of_two_sources_resumes_in_the_middle_of_an_epoch(tmp_path: Path, tiny_byte_level: Path) -> None:
    uninterrupted, resumed = (two_sources(tmp_path, tiny_byte_level, name) for name in ("uninterrupted", "resumed"))
    steps = train(uninterrupted).steps
    train(resumed, stop_at=3)
    assert train(resumed, resume=True).steps == steps
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "uninterrupted"), abs=1e-6)
    start = read_metrics(tmp_path / "uninterrupted" / "metrics.jsonl")[0]
    assert [source["name"] for source in start["sources"]] == ["corpus.jsonl", "more.txt"]
    epoch_samples = sum(source["epoch_samples"] for source in start["sources"])
    assert math.ceil(2 * epoch_samples / 5) == steps
    assert epoch_samples > 3 * 5
    with pytest.raises(CheckpointError, match=r"data.sources.weight = \[0.5, 1.0\], this run has \[0.25, 1.0\]"):
        train(two_sources(tmp_path, tiny_byte_level, "resumed", weight=0.25), resume=True)


def test_the_order_of_responses_does_not_change_the_losses(tmp_path: Path, tiny_byte_level: Path) -> None:
    class RandomDelay(FormulaEngine):
        async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
            await asyncio.sleep(0.002 * (sum(sequence) % 17))
            return await super().score(sequence, start, top_k)

    corpus = write_corpus(tmp_path)
    for name, engine in (("constant", FormulaEngine(tiny_byte_level)), ("random", RandomDelay(tiny_byte_level))):
        with serving(engine) as url:
            train(run_config(tiny_byte_level, corpus, tmp_path / name, [url]))
    assert losses(tmp_path / "constant") == losses(tmp_path / "random")


def test_gradient_accumulation_changes_no_loss(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    with serving(FormulaEngine(tiny_byte_level)) as url:
        for microbatches in (1, 2, 4):
            sections = {"batch_samples": 4, "gradient_accumulation_steps": microbatches}
            train(run_config(tiny_byte_level, corpus, tmp_path / str(microbatches), [url], train=sections))
    once = losses(tmp_path / "1")
    for name in ("2", "4"):
        assert [losses(tmp_path / name)[n] for n in once] == pytest.approx(list(once.values()), abs=1e-5)


@pytest.mark.parametrize(("cache_bytes", "num_requests"), [(1 << 30, 12), (0, 36)])
def test_repeated_samples_are_requested_again_only_without_a_cache(
    tmp_path: Path, tiny_byte_level: Path, cache_bytes: int, num_requests: int
) -> None:
    engine = FormulaEngine(tiny_byte_level)
    sections = {"epochs": 3, "target_cache_bytes": cache_bytes, "prefetch_tokens": 1}
    with serving(engine) as url:
        train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url], train=sections))
    assert engine.num_requests == num_requests


def test_training_without_teachers(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    result = train(config)
    assert result.held_out[-1][1] < result.held_out[0][1]


def test_train_layers_changes_only_the_upper_layers(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(
        tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], student={"train_layers": 1, "precision": "bf16"}
    )
    train(config)
    before = AutoModelForCausalLM.from_pretrained(tiny_byte_level).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.norm")) for name in changed)


def test_the_exported_model_has_the_measured_bits_per_byte(tmp_path: Path, tiny_byte_level: Path, device: str) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], student={"device": device})
    result = train(config)
    assert result.model is not None
    student = load_student(config.student.model_copy(update={"model": str(result.model)}))
    assert Vocabulary.load(result.model).fingerprint == Vocabulary.load(tiny_byte_level).fingerprint
    from trainer.sources.corpus import load_corpus

    corpus = load_corpus(config.data, config.eval, student.vocabulary, 0)
    tokenizer = SampleTokenizer(student.vocabulary, student.vocabulary.prefix)
    measured = sum(evaluate(student, [tokenizer.tokenize(s) for s in corpus.held_out], 64), Evaluation())
    assert measured.bpb == pytest.approx(result.held_out[-1][1], abs=1e-6)


def test_a_folder_that_contains_a_run_is_not_overwritten(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    train(config, stop_at=1)
    with pytest.raises(CheckpointError, match="already contains a run"):
        train(config)


def test_an_incomplete_line_of_metrics_is_removed(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    train(config, stop_at=2)
    with (tmp_path / "out" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')
    train(config, resume=True)
    assert losses(tmp_path / "out").keys() == set(range(1, 7))


@pytest.mark.parametrize("held_out_documents", [0, 2])
def test_the_student_trains_in_training_mode(
    tmp_path: Path, tiny_byte_level: Path, held_out_documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.training import loop

    modes = []

    def step(student: Student, *rest: Any) -> StepResult:
        modes.append(student.model.training)
        return train_step(student, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    held_out = {"held_out_documents": held_out_documents}
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], eval=held_out))
    assert modes == [True] * 6


def test_old_checkpoints_are_deleted(tmp_path: Path, tiny_byte_level: Path) -> None:
    out = tmp_path / "out"
    sections = {"dir": str(out), "checkpoint_every_steps": 1, "keep_checkpoints": 2}
    train(run_config(tiny_byte_level, write_corpus(tmp_path), out, [], output=sections))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize(
    "key",
    ["train.seed", "student.train_layers", "student.lora", "samples", "student weights", "eval.max_samples"],
)
def test_resuming_with_another_identity_is_rejected(tmp_path: Path, tiny_byte_level: Path, key: str) -> None:
    corpus, model = write_corpus(tmp_path), tiny_byte_level
    train(run_config(model, corpus, tmp_path / "out", []), stop_at=2)
    if key == "samples":
        corpus.write_text(corpus.read_text(encoding="utf-8").replace("gull", "seal"), encoding="utf-8")
    if key == "student weights":
        model = save_tiny_model(tmp_path / "other", kind="byte_level", seed=9)
    changed: dict[str, dict[str, dict[str, Any]]] = {
        "train.seed": {"train": {"seed": 7}},
        "student.train_layers": {"student": {"train_layers": 1}},
        "student.lora": {"student": {"lora": {"rank": 4}}},
        "eval.max_samples": {"eval": {"max_samples": 1}},
    }
    other = run_config(model, corpus, tmp_path / "out", [], **changed.get(key, {}))
    with pytest.raises(CheckpointError, match=f"{key}.*, this run has"):
        train(other, resume=True)


def test_a_resumed_optimizer_uses_the_current_run_file(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = write_corpus(tmp_path)
    train(run_config(tiny_byte_level, corpus, tmp_path / "out", []), stop_at=2)
    optim = {"weight_decay": 0.3, "betas": (0.5, 0.6)}
    changed = run_config(tiny_byte_level, corpus, tmp_path / "out", [], optim=optim)
    optimizer = begin(changed, Ranks(), resume=True).optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    train(config, stop_at=2)
    (tmp_path / "out" / "checkpoints" / ".partial-00000004").mkdir()
    assert train(config, resume=True).steps == 6


def test_a_checkpoint_is_written_without_cuda_streams(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU, torch would copy on the writing thread in the CUDA stream of the training."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("copied in a CUDA stream")

    gpu = SimpleNamespace(**vars(torch) | {"cuda": SimpleNamespace(is_available=lambda: True)})
    monkeypatch.setattr(filesystem, "torch", gpu)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", fail)
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []), stop_at=1)
    assert (tmp_path / "out" / "checkpoints" / "step-00000001").is_dir()


def test_other_errors_of_a_checkpoint_are_not_reported_as_a_full_disk(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("trainer.training.checkpoint.async_save", fail)
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    message = r"\(CUDA out of memory\); there is no earlier one: run again with --resume$"
    with pytest.raises(CheckpointError, match=message):
        train(config, stop_at=2)


def test_deterministic_runs_have_identical_losses(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, device: str
) -> None:
    sections: dict[str, Any] = {"student": {"device": device}, "train": {"deterministic": True}}
    try:
        with served_models(tiny_sentencepiece) as urls:
            for name in ("one", "two"):
                train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / name, urls, **sections))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(tmp_path: Path, tiny_byte_level: Path) -> None:
    """A process with a limit on the size of files fails like one on a full disk."""
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    train(config, stop_at=2)
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from tests.trainer.test_loop import resume_limited as r; r(sys.argv[1])",
         config.model_dump_json()],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert re.search(
        r"last .* one is step-00000002: free disk space \(.* MB are free\), then run again with --r", done.stdout
    )
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(config, resume=True).steps == 6


def resume_limited(config_json: str) -> None:
    """Resume with a limit on the size of files that allows metrics and prevents a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        train(RunConfig.model_validate_json(config_json), resume=True)
    except CheckpointError as error:
        sys.stdout.write(str(error))
        sys.exit(3)


def test_an_unreachable_teacher_is_an_error_before_the_folder_is_made(tmp_path: Path, tiny_byte_level: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match="teacher t0 at"):
        train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))
    assert not (tmp_path / "out").exists()


def test_top_k_above_the_teachers_maximum_is_rejected_before_any_request(tmp_path: Path, tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level, max_top_k=8)
    with serving(engine) as url, pytest.raises(Rejected, match="teacher t0: top_k is 16, .* returns at most 8"):
        train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))
    assert engine.num_requests == 0
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_than_its_card_is_rejected(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, tokenizer_sha256="0" * 64)) as url:
        with pytest.raises(FingerprintMismatch, match="teacher t0 at .* another tokenizer"):
            train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))


def test_an_error_for_a_too_long_window_names_teacher_and_sample(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, max_tokens=20)) as url:
        with pytest.raises(
            DataError, match=r"sample corpus.jsonl:\d+#\d+: teacher t0 takes 20 tokens, the sample has \d+"
        ):
            train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))


def test_every_sample_is_trained_on_and_the_last_batch_may_be_smaller(tmp_path: Path, tiny_byte_level: Path) -> None:
    num_tokens = []
    for batch_samples, num_steps in ((64, 1), (5, 3), (4, 3)):  # of 12 samples
        out = tmp_path / str(batch_samples)
        sections = {"train": {"batch_samples": batch_samples, "epochs": 1}}
        assert train(run_config(tiny_byte_level, write_corpus(tmp_path), out, [], **sections)).steps == num_steps
        steps = [event for event in read_metrics(out / "metrics.jsonl") if event["event"] == "step"]
        num_tokens.append(sum(event["tokens"] for event in steps))
    assert num_tokens[0] == num_tokens[1] == num_tokens[2]


def test_the_learning_rate_has_its_peak_after_the_warm_up_and_its_final_value_at_the_last_step() -> None:
    for warmup_steps, first in ((0, 1.0), (1, 1.0), (4, 0.25)):
        config = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=warmup_steps)
        rates = [learning_rate(step, 10, config) for step in range(10)]
        assert (rates[0], rates[-1]) == pytest.approx((first, 0.1))
        assert rates[max(warmup_steps - 1, 0)] == max(rates) == 1.0
    assert learning_rate(0, 1, OptimConfig(lr=1.0)) == 1.0


def test_a_warm_up_longer_than_the_run_is_an_error(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], optim={"warmup_steps": 7})
    with pytest.raises(ConfigError, match="optim.warmup_steps is 7, more than the 6 steps of the run"):
        train(config)


def test_a_nan_loss_is_an_error_naming_the_sample_and_updates_nothing(tmp_path: Path, tiny_byte_level: Path) -> None:
    from trainer.records import DistillationExample
    from trainer.sources.corpus import load_corpus
    from trainer.training.optimizer import make_optimizer

    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    student = load_student(config.student)
    corpus = load_corpus(config.data, config.eval, student.vocabulary, 0)
    tokenizer = SampleTokenizer(student.vocabulary, student.vocabulary.prefix)
    examples = [DistillationExample(s, tokenizer.tokenize(s)) for s in corpus.train[:2]]
    optimizer = make_optimizer(student, config.optim)
    with torch.no_grad():
        weight = student.model.get_input_embeddings().weight
        first, second = (set(example.tokenized.tokens.ids.tolist()) for example in examples)
        weight[(second - first).pop()] = float("nan")
    before = {name: p.clone() for name, p in student.model.named_parameters()}
    with pytest.raises(NonFiniteLoss, match=f"sample {corpus.train[0].name}|sample {corpus.train[1].name}"):
        train_step(student, optimizer, examples, plan_step(config, 0, 1))
    for name, p in student.model.named_parameters():
        assert torch.equal(torch.nan_to_num(p), torch.nan_to_num(before[name]))


def test_a_student_identical_to_its_teacher_has_zero_divergence(tmp_path: Path, tiny_byte_level: Path) -> None:
    """The student and the served teacher have the same distribution at every position."""
    with served_models(tiny_byte_level) as urls:
        config = run_config(
            tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, loss={"ce_weight": 0.0}, train={"steps": 1}
        )
        train(config)
    (step,) = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert abs(step["divergence"]) < 1e-5


def test_a_student_identical_to_its_teacher_has_zero_divergence_with_bos(
    tmp_path: Path, tiny_sentencepiece: Path
) -> None:
    from teachers.engines.transformers import TransformersEngine
    from teachers.engines.transformers_options import TransformersOptions

    engine = TransformersEngine(tiny_sentencepiece, TransformersOptions(dtype="float32", bos="yes"))
    with serving(engine) as url:
        config = run_config(
            tiny_sentencepiece,
            write_corpus(tmp_path),
            tmp_path / "out",
            [url],
            loss={"ce_weight": 0.0},
            train={"steps": 1},
            data={"close_documents": True},
        )
        train(config)
    engine.close()
    (step,) = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert abs(step["divergence"]) < 1e-5


def test_the_collector_contains_the_values_of_the_metrics(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls)
        student = Vocabulary.load(tiny_byte_level)
        collector = Collector()

        async def score() -> ScoredSample | None:
            tokenizer = SampleTokenizer(student, student.prefix)
            async with connect_teachers(config.teachers, tokenizer, config.data) as connection:
                scorer = SampleScorer(connection, tokenizer, config.data)
                return await scorer.score(Sample(0, "s", "The harbour office opened at six."), collector)

        scored = asyncio.run(score())
        assert scored is not None
        (example,) = Fuser(config, len(student)).fuse([scored], telemetry=collector)
    telemetry = collector.teacher("t0")
    assert telemetry.report.valid == len(example.tokenized) - 1
    assert telemetry.weight == 1.0
    assert collector.last_response is not None
    assert collector.last_response.teacher == "t0"
    assert collector.seconds.keys() == {"tokenize", "align"}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_a_stop_signal_saves_the_run_and_resuming_completes_it(
    tmp_path: Path, tiny_byte_level: Path, stop: signal.Signals
) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])

    def stop_at_step_2(record: EventRecord) -> None:
        if record["event"] == "step" and record["step"] == 2:
            signal.raise_signal(stop)

    before = signal.getsignal(stop)
    result = train(config, listener=stop_at_step_2)
    assert signal.getsignal(stop) is before
    assert result.terminated
    assert 2 <= result.steps < 6
    assert train(config, resume=True).steps == 6


def test_a_run_under_nohup_ignores_that_its_terminal_is_closed(tmp_path: Path, tiny_byte_level: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
        result = train(config, listener=lambda _: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (result.steps, result.terminated) == (6, False)
