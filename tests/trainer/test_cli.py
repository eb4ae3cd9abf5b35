"""The commands as a user calls them: what they print, and one sentence for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.serve import FormulaEngine, free_port, serving
from tests.tiny import TEXT
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from trainer.cli import app
from trainer.config import RunConfig
from trainer.targets.fusion import SCOPES


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_file(folder: Path, config: RunConfig) -> Path:
    """A run file with the config's values, written as a person would."""

    def lines(name: str, section: dict[str, Any], brackets: str = "[{}]") -> list[str]:
        values = [f"{key} = {json.dumps(value)}" for key, value in section.items() if value is not None]
        return [brackets.format(name), *values]

    raw = config.model_dump(mode="json")
    teachers, sources = raw.pop("teachers"), raw["data"].pop("sources")
    text = [line for name, section in raw.items() for line in lines(name, section)]
    text += [line for source in sources for line in lines("data.sources", source, "[[{}]]")]
    text += [line for teacher in teachers for line in lines("teachers", teacher, "[[{}]]")]
    path = folder / "run.toml"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def assert_one_sentence(result: Result, says: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
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


def test_train_shows_progress_to_people(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("train", path)
    assert result.exit_code == 0
    for words in ("step    6/6", "loss", "tokens/s", "waited", "t0 100%", "held out after step 6"):
        assert words in result.stderr


def test_preview_compares_everything_on_the_same_text(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("preview", path, "--json")
        shown = call("preview", path)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    itself, other = printed["teachers"]
    assert itself["own_bpb"] == pytest.approx(printed["student_bpb"], rel=1e-4)
    assert itself["aligned_bpb"] == pytest.approx(itself["own_bpb"], rel=1e-4)
    assert other["aligned_bpb"] <= other["own_bpb"] + 1e-4
    by_scope = {f"{method} by {scope}" for method in ("min_ce", "avg_ce", "confidence") for scope in SCOPES}
    assert set(printed["fused_bpb"]) == by_scope | {"mean", "geometric", "adaptive", "fusellm_min_ce", "fusellm_avg_ce"}
    best = min(t["aligned_bpb"] for t in printed["teachers"])
    assert printed["fused_bpb"]["min_ce by token"] <= printed["fused_bpb"]["min_ce by sample"] <= best + 1e-6
    assert "fused by mean" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_align_knows_the_papers_methods_too(tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("--teacher", tiny_sentencepiece, "--student", tiny_byte_level, "--text", tmp_path / "t.txt", "--json")
    chain, em = (json.loads(call("align", *arguments, "--method", m).stdout) for m in ("chain", "em"))
    assert chain["valid"] == chain["positions"] == em["positions"]
    assert 0 < em["valid"] < chain["valid"]
    assert em["aligned_bpb"] is None or em["aligned_bpb"] > chain["aligned_bpb"]


def test_preview_needs_held_out_text(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        config = run_config(
            tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, eval={"held_out_documents": 0}
        )
        assert_one_sentence(call("preview", run_file(tmp_path, config)), "set eval.held_out_documents")


@pytest.mark.parametrize("served", [True, False])
def test_align_prints_its_figures(
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


def test_doctor_finds_a_healthy_run_healthy(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        result = call("doctor", path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"]
    assert "corpus.jsonl: 10 documents, " in result.stdout


def test_doctor_names_broken_lines_and_reads_a_part_of_many_samples(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.commands.doctor.EXAMINED", 5)
    corpus = write_corpus(tmp_path)
    with corpus.open("a", encoding="utf-8") as file:
        file.write("no\n")
    with served_models(tiny_byte_level) as urls:
        config = run_config(tiny_byte_level, corpus, tmp_path / "out", urls, data={"max_broken": 1})
        result = call("doctor", run_file(tmp_path, config))
    assert result.exit_code == 0, result.output
    assert f"12 samples an epoch; 1 broken ({corpus}, line 11: expected a JSON object, received 'no')" in result.stdout
    assert "the longest of 4 samples is" in result.stdout


def test_doctor_names_everything_that_is_wrong_at_once(tmp_path: Path, tiny_byte_level: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    small = FormulaEngine(tiny_byte_level, max_top_k=8)
    short = FormulaEngine(tiny_byte_level, max_tokens=58)
    with serving(small) as one, serving(short) as two, serving(FormulaEngine(tiny_byte_level), key="k") as three:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [gone, one, two, three])
        result = call("doctor", run_file(tmp_path, config))
    assert result.exit_code == 1
    wrong = [line for line in result.stdout.splitlines() if line.startswith("WRONG")]
    for line, says in zip(
        wrong,
        ["nothing answers", "answers at most 8", "lower data.window_tokens", "send the teacher's key"],
        strict=True,
    ):
        assert says in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("student.train_layers=9", "the model has 2 layers"),
        ("data.window_tokens=600", "the student takes 512"),
        ("train.batch_samples=64", "do not fill one batch"),
        ("data.sources.0.files=['/nowhere']", "/nowhere is neither a file"),
        ("student.device=cuda", "student.device is cuda, but torch finds no GPU here"),
        ("output.dir='CORPUS'", "is a file"),
    ],
)
def test_doctor_refuses_what_train_would(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch, override: str, says: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    corpus = write_corpus(tmp_path)
    path = run_file(tmp_path, run_config(tiny_byte_level, corpus, tmp_path / "out", []))
    override = override.replace("CORPUS", str(corpus))
    for command in ("doctor", "train"):
        result = call(command, path, "--set", override)
        assert result.exit_code == 1
        assert says in result.output


def test_doctor_says_that_a_folder_holds_a_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert call("train", path, "--json", "--stop-at", 1).exit_code == 0
    result = call("doctor", path)
    assert result.exit_code == 0
    assert "out holds a run already: only --resume goes on with it" in result.stdout


def test_help_says_which_extras_are_needed() -> None:
    assert "the extra eval" in call("eval", "--help").stdout


def test_doctor_sees_a_teacher_that_wants_bos_and_is_not_given_it(tmp_path: Path, gemma: Path, smollm2: Path) -> None:
    from teachers.engine import EngineOptions
    from teachers.engines.transformers import TransformersEngine

    engine = TransformersEngine(gemma, EngineOptions(bos="no"))
    with serving(engine) as url:
        config = run_config(smollm2, write_corpus(tmp_path), tmp_path / "out", [url])
        result = call("doctor", run_file(tmp_path, config))
    engine.close()
    assert result.exit_code == 1
    assert "serve it with --bos yes" in result.stdout


# --- bad input: one sentence, exit code 1, nothing half-written ---


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; the nearest known one is 'epochs'"),
        ("teachers.0.urls=['http://127.0.0.1:9']", "nothing answers"),
        ("teachers.0.urls=['127.0.0.1:9']", "teacher t0: '127.0.0.1:9' is no address: expected http://HOST:PORT"),
        ("teachers.0.key_env='NOT_SET_ANYWHERE'", "the environment variable NOT_SET_ANYWHERE is not set"),
        ("teachers.0.key_file='/nowhere/key'", "cannot read the key file /nowhere/key"),
        ("teachers.0.top_k=129", "top_k is 129, it answers at most 128"),
        ("student.model='nowhere'", "nowhere is neither a model directory nor a name in"),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0, received -1"),
        ("optim.lr=inf", "optim.lr: Input should be a finite number, received inf"),
        ("output.dir='CORPUS'", "is a file"),
        ("output.dir='CORPUS/deeper'", "output.dir: cannot make"),
        ("student.device='nonsense'", "student.model: cannot load"),
        ("student.train_layers=9", "student.train_layers is 9, but the model has 2 layers"),
        ("data.window_tokens=513", "data.window_tokens is 513, the student takes 512"),
        ("data.sources.0.files=['/nowhere/text.txt']", "/nowhere/text.txt is neither a file"),
        ("data.sources.0.files=['EMPTY']", "is empty: give a text of at least one byte"),
        ("data.sources.0.files=['LATIN']", "is not UTF-8: byte 0xe9 at 3"),
    ],
)
def test_train_refuses_in_one_sentence(tmp_path: Path, tiny_byte_level: Path, override: str, says: str) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    override = override.replace("EMPTY", f"{tmp_path}/empty.txt").replace("LATIN", f"{tmp_path}/latin.txt")
    override = override.replace("CORPUS", f"{tmp_path}/corpus.jsonl")
    with served_models(tiny_byte_level) as urls:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls))
        assert_one_sentence(call("train", path, "--set", override), says)
        as_json = call("train", path, "--set", override, "--json")
    assert says in json.loads(as_json.stderr)["error"]
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_wrong_key(tmp_path: Path, tiny_byte_level: Path) -> None:
    (tmp_path / "key").write_text("wrong\n", encoding="utf-8")
    with serving(FormulaEngine(tiny_byte_level), key="right") as url:
        path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))
        for sets, says in (
            ([], "it asks for a key (send the teacher's key"),
            (["--set", f"teachers.0.key_file='{tmp_path}/key'"], "its key is not the one that was sent"),
        ):
            assert_one_sentence(call("train", path, *sets), says)
        (tmp_path / "key").write_text("right\n", encoding="utf-8")
        assert call("train", path, "--json", "--set", f"teachers.0.key_file='{tmp_path}/key'").exit_code == 0


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"\xff\xfe", "is not UTF-8: byte 0xff at 0")])
def test_align_refuses_texts_it_cannot_read(tmp_path: Path, tiny_byte_level: Path, content: bytes, says: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    arguments = ["--teacher", tiny_byte_level, "--student", tiny_byte_level, "--text", tmp_path / "t.txt"]
    assert_one_sentence(call("align", *arguments), says)


def test_align_refuses_k_above_the_maximum(tmp_path: Path, tiny_byte_level: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--teacher", tiny_byte_level, "--student", tiny_byte_level, "--text", tmp_path / "t.txt"]
    assert_one_sentence(call("align", *arguments, "--top-k", "129"), "top_k is 129, it answers at most 128")


def test_teach_refuses_a_taken_port_and_a_folder_without_a_model(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        port = url.rpartition(":")[2]
        assert_one_sentence(call("teach", tiny_byte_level, "--port", port), f"cannot listen on 127.0.0.1:{port}")
    assert_one_sentence(call("teach", tmp_path / "nothing"), "is neither a model directory")
    refused = call("teach", tiny_byte_level, "--dtype", "int8")
    assert refused.exit_code == 2
    assert "int8" in refused.stderr
    assert "bfloat16" in refused.stderr
