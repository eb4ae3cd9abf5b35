"""Command-line tests: output of the commands, and one-sentence errors for invalid input."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.serve import FormulaEngine, free_port, serving
from tests.tiny import TEXT
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from trainer.cli.__main__ import app
from trainer.config import RunConfig
from trainer.fusion.base import SCOPES


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_file(folder: Path, config: RunConfig) -> Path:
    """Write a configuration as a run file in TOML."""

    def lines(name: str, section: dict[str, Any], brackets: str = "[{}]") -> list[str]:
        values = [f"{key} = {json.dumps(value)}" for key, value in section.items() if value is not None]
        return [brackets.format(name), *values]

    raw = config.model_dump(mode="json")
    teachers, sources = raw.pop("teachers"), raw["data"].pop("sources")
    supervision = raw["data"].pop("supervision")
    text = [line for name, section in raw.items() if section is not None for line in lines(name, section)]
    text += lines("data.supervision", supervision)
    text += [line for source in sources for line in lines("data.sources", source, "[[{}]]")]
    text += [line for teacher in teachers for line in lines("teachers", teacher, "[[{}]]")]
    path = folder / "run.toml"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def assert_one_sentence(result: Result, message: str) -> None:
    """Assert that a command failed with one line on standard error that contains the message."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_train_writes_metrics_checkpoint_and_model(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("train", path, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["steps"] == 6
    assert Path(printed["model"], "config.json").exists()
    assert len(losses(tmp_path / "out")) == 6


def test_train_shows_progress(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("train", path)
    assert result.exit_code == 0
    for words in ("step    6/6", "loss", "tokens/s", "waited", "t0 100%", "held-out text after step 6"):
        assert words in result.stderr


def test_preview_compares_teachers_and_fusion_methods_on_the_same_text(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("preview", path, "--json")
        shown = call("preview", path)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    same_model, other = printed["teachers"]
    assert same_model["own_bpb"] == pytest.approx(printed["student_bpb"], rel=1e-4)
    assert same_model["aligned_bpb"] == pytest.approx(same_model["own_bpb"], rel=1e-4)
    assert other["aligned_bpb"] <= other["own_bpb"] + 1e-4
    by_scope = {f"{method} by {scope}" for method in ("min_ce", "avg_ce", "confidence") for scope in SCOPES}
    assert set(printed["fused_bpb"]) == by_scope | {"mean", "geometric", "adaptive", "fusellm_min_ce", "fusellm_avg_ce"}
    best = min(t["aligned_bpb"] for t in printed["teachers"])
    assert printed["fused_bpb"]["min_ce by token"] <= printed["fused_bpb"]["min_ce by sample"] <= best + 1e-6
    assert "fused by mean" in shown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("signal", ["em", "min_ed"])
def test_preview_prints_valid_json_if_bits_per_byte_are_infinite(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, signal: str
) -> None:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls)
        path = run_file(tmp_path, config)
        result = call("preview", path, "--json", "--set", f"teachers.1.signal={signal}")
        shown = call("preview", path, "--set", f"teachers.1.signal={signal}")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout, parse_constant=reject)
    same_model, other = printed["teachers"]
    assert same_model["aligned_bpb"] == pytest.approx(same_model["own_bpb"], rel=1e-4)
    assert other["aligned_bpb"] is None
    assert other["own_bpb"] > 0
    assert shown.exit_code == 0, shown.output
    assert "teacher t1" in shown.stderr


@pytest.mark.parametrize("method", ["adaptive", "min_ce"])
def test_a_baseline_without_teachers_runs_and_resumes_with_any_fusion_method(
    tmp_path: Path, tiny_byte_level: Path, method: str
) -> None:
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:1"]
    config = run_config(
        tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, fusion={"method": method, "schedule": "linear"}
    )
    arguments = ("train", run_file(tmp_path, config), "--json", "--set", "teachers=[]", "--set", "loss.ce_weight=1")
    stopped = call(*arguments, "--stop-at", 3)
    assert stopped.exit_code == 0, stopped.output
    result = call(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 6
    assert losses(tmp_path / "out").keys() == set(range(1, 7))


def test_align_supports_the_methods_of_fusellm(tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("--teacher", tiny_sentencepiece, "--student", tiny_byte_level, "--text", tmp_path / "t.txt", "--json")
    chain, em = (json.loads(call("align", *arguments, "--method", m).stdout) for m in ("byte_chain", "em"))
    assert chain["valid"] == chain["positions"] == em["positions"]
    assert 0 < em["valid"] < chain["valid"]
    assert em["aligned_bpb"] is None or em["aligned_bpb"] > chain["aligned_bpb"]


def test_preview_requires_held_out_text(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        config = run_config(
            tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, eval={"held_out_documents": 0}
        )
        assert_one_sentence(call("preview", run_file(tmp_path, config)), "set eval.held_out_documents")


@pytest.mark.parametrize("served", [True, False])
def test_align_prints_coverage_bits_per_byte_and_speed(
    tmp_path: Path, tiny_sentencepiece: Path, tiny_byte_level: Path, served: bool
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--student", tiny_byte_level, "--text", tmp_path / "text.txt", "--top-k", "32", "--json"]
    if served:
        with served_models(tiny_sentencepiece) as urls:
            result = call("align", "--teacher", urls[0], *arguments)
    else:
        result = call("align", "--teacher", tiny_sentencepiece, *arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert set(printed) == {"positions", "valid", "teacher_bpb", "aligned_bpb", "mean_mass", "tokens_per_second"}
    assert printed["valid"] in (printed["positions"], printed["positions"] - 1)
    assert printed["aligned_bpb"] <= printed["teacher_bpb"] + 1e-4
    assert printed["tokens_per_second"] > 1000


def test_doctor_accepts_a_valid_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("doctor", path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"]
    assert "corpus.jsonl: texts: column text; 10 documents, " in result.stdout


def test_doctor_lists_invalid_lines_and_tokenizes_at_most_max_examined_samples(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.cli.run_checks.MAX_EXAMINED", 5)
    corpus = write_corpus(tmp_path)
    with corpus.open("a", encoding="utf-8") as file:
        file.write("no\n")
    with served_models(tiny_byte_level) as urls:
        config = run_config(tiny_byte_level, corpus, tmp_path / "out", urls, data={"max_invalid": 1})
        result = call("doctor", run_file(tmp_path, config))
    assert result.exit_code == 0, result.output
    assert (
        f"12 samples per epoch; 1 invalid ({corpus}, line 11: expected a JSON object, received 'no')" in result.stdout
    )
    assert "the longest of 4 samples has" in result.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.lora.targets=['nowhere']", "student.lora.targets: "),
        ("student.router_aux_loss_weight=0.1", "transformers has no auxiliary loss"),
        ("student.train_layers=9", "the model has 2 layers"),
    ],
)
def test_doctor_and_train_reject_the_same_students(
    tmp_path: Path, tiny_byte_level: Path, override: str, message: str
) -> None:
    path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert_one_sentence(call("train", path, "--set", override), message)
    result = call("doctor", path, "--set", override)
    assert result.exit_code == 1
    (wrong,) = [line for line in result.stdout.splitlines() if line.startswith("WRONG")]
    assert message in wrong


def test_doctor_and_train_warn_if_the_epochs_end_a_run_before_its_steps(tmp_path: Path, tiny_byte_level: Path) -> None:
    path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    warning = "train.steps is 7, but train.epochs = 2 ends the run after 6 steps: raise train.epochs"
    assert f"warn   data: {warning}" in call("doctor", path, "--set", "train.steps=7").stdout
    assert warning not in call("doctor", path, "--set", "train.steps=6").stdout
    assert f"warning: {warning}" in call("train", path, "--set", "train.steps=7").stderr


def test_doctor_reports_all_problems_at_once(tmp_path: Path, tiny_byte_level: Path) -> None:
    unreachable = f"http://127.0.0.1:{free_port()}"
    low_top_k = FormulaEngine(tiny_byte_level, max_top_k=8)
    short = FormulaEngine(tiny_byte_level, max_tokens=58)
    with serving(low_top_k) as one, serving(short) as two, serving(FormulaEngine(tiny_byte_level), key="k") as three:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [unreachable, one, two, three])
        result = call("doctor", run_file(tmp_path, config))
    assert result.exit_code == 1
    wrong = [line for line in result.stdout.splitlines() if line.startswith("WRONG")]
    for line, message in zip(
        wrong,
        ["no response", "the teacher returns at most 8", "lower data.window_tokens", "send the teacher's key"],
        strict=True,
    ):
        assert message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.train_layers=9", "the model has 2 layers"),
        ("data.window_tokens=600", "the student takes 512 tokens"),
        ("optim.warmup_steps=7", "more than the 6 steps of the run"),
        ("data.sources.0.files=['/nowhere']", "/nowhere is neither a file"),
        ("student.device=cuda", "student.device is cuda, but torch finds no GPU here"),
        ("output.dir='CORPUS'", "is a file"),
    ],
)
def test_doctor_and_train_reject_the_same_settings(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    corpus = write_corpus(tmp_path)
    path = run_file(tmp_path, run_config(tiny_byte_level, corpus, tmp_path / "out", []))
    override = override.replace("CORPUS", str(corpus))
    for command in ("doctor", "train"):
        result = call(command, path, "--set", override)
        assert result.exit_code == 1
        assert message in result.output


def test_doctor_reports_that_the_folder_already_contains_a_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert call("train", path, "--json", "--stop-at", 1).exit_code == 0
    result = call("doctor", path)
    assert result.exit_code == 0
    assert "out already contains a run: only --resume continues it" in result.stdout


def test_help_names_the_required_extras() -> None:
    assert "the extra `eval`" in call("eval", "--help").stdout


def test_doctor_detects_a_teacher_that_is_served_without_the_bos_it_needs(
    tmp_path: Path, gemma: Path, smollm2: Path
) -> None:
    from teachers.engines.transformers import TransformersEngine
    from teachers.engines.transformers_options import TransformersOptions

    engine = TransformersEngine(gemma, TransformersOptions(bos="no"))
    with serving(engine) as url:
        config = run_config(smollm2, write_corpus(tmp_path), tmp_path / "out", [url])
        result = call("doctor", run_file(tmp_path, config))
    engine.close()
    assert result.exit_code == 1
    assert "serve the teacher with --bos yes" in result.stdout


def test_doctor_detects_a_card_that_expects_bos_but_names_none(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level, expects_bos=True, bos_id=None)) as url:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url])
        result = call("doctor", run_file(tmp_path, config))
    assert result.exit_code == 1
    assert "its card expects BOS but names no BOS token: serve the teacher with --bos no" in result.stdout


# --- invalid input: one sentence, exit code 1, no files written ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; the nearest known one is 'epochs'"),
        ("teachers.0.urls=['http://127.0.0.1:9']", "no response"),
        ("teachers.0.urls=['127.0.0.1:9']", "teacher t0: '127.0.0.1:9' is not an address: expected http://HOST:PORT"),
        ("teachers.0.key_env='NOT_SET_ANYWHERE'", "the environment variable NOT_SET_ANYWHERE is not set"),
        ("teachers.0.key_file='/nowhere/key'", "cannot read the key file /nowhere/key"),
        ("teachers.0.top_k=129", "top_k is 129, the teacher returns at most 128"),
        ("student.model='nowhere'", "nowhere is neither a model directory nor a name in"),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0, received -1"),
        ("optim.lr=inf", "optim.lr: Input should be a finite number, received inf"),
        ("output.dir='CORPUS'", "is a file"),
        ("output.dir='CORPUS/deeper'", "output.dir: cannot make"),
        ("student.device='nonsense'", "student.device: expected cpu, cuda or cuda:N"),
        ("student.train_layers=9", "student.train_layers is 9, but the model has 2 layers"),
        ("data.window_tokens=513", "data.window_tokens is 513, the student takes 512 tokens"),
        ("data.sources.0.files=['/nowhere/text.txt']", "/nowhere/text.txt is neither a file"),
        ("data.sources.0.files=['EMPTY']", "is empty: expected a file of at least one byte"),
        ("data.sources.0.files=['LATIN']", "is not UTF-8: byte 0xe9 at 3"),
    ],
)
def test_train_rejects_invalid_settings_in_one_sentence(
    tmp_path: Path, tiny_byte_level: Path, override: str, message: str
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    override = override.replace("EMPTY", f"{tmp_path}/empty.txt").replace("LATIN", f"{tmp_path}/latin.txt")
    override = override.replace("CORPUS", f"{tmp_path}/corpus.jsonl")
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        assert_one_sentence(call("train", path, "--set", override), message)
        as_json = call("train", path, "--set", override, "--json")
    assert message in json.loads(as_json.stderr)["error"]
    assert not (tmp_path / "out").exists()


def test_train_rejects_a_wrong_key(tmp_path: Path, tiny_byte_level: Path) -> None:
    (tmp_path / "key").write_text("wrong\n", encoding="utf-8")
    with serving(FormulaEngine(tiny_byte_level), key="right") as url:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))
        for sets, message in (
            ([], "the server requires a key, see key_env and key_file (send the teacher's key"),
            (["--set", f"teachers.0.key_file='{tmp_path}/key'"], "the server rejects the key"),
        ):
            assert_one_sentence(call("train", path, *sets), message)
        (tmp_path / "key").write_text("right\n", encoding="utf-8")
        assert call("train", path, "--json", "--set", f"teachers.0.key_file='{tmp_path}/key'").exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe", "is UTF-16, expected UTF-8"), (b"\xffa", "is not UTF-8: byte 0xff at 0")],
)
def test_align_rejects_invalid_text_files(tmp_path: Path, tiny_byte_level: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    arguments = ["--teacher", tiny_byte_level, "--student", tiny_byte_level, "--text", tmp_path / "t.txt"]
    assert_one_sentence(call("align", *arguments), message)


def test_align_rejects_a_top_k_above_the_maximum(tmp_path: Path, tiny_byte_level: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--teacher", tiny_byte_level, "--student", tiny_byte_level, "--text", tmp_path / "t.txt"]
    assert_one_sentence(call("align", *arguments, "--top-k", "129"), "expected a top_k of at most 128, received 129")


def test_serve_rejects_a_port_in_use_a_folder_without_a_model_and_an_unknown_dtype(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        port = url.rpartition(":")[2]
        assert_one_sentence(call("serve", tiny_byte_level, "--port", port), f"cannot listen on 127.0.0.1:{port}")
    assert_one_sentence(call("serve", tmp_path / "nothing"), "is neither a model directory")
    result = call("serve", tiny_byte_level, "--dtype", "int8")
    assert result.exit_code == 2
    assert "int8" in result.stderr
    assert "bfloat16" in result.stderr
