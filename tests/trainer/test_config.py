"""The run file: accepted keys, overrides, and errors for invalid values."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from trainer.config import RunConfig
from trainer.config_reference import reference, sections
from trainer.distributed import process_group
from trainer.errors import ConfigError
from trainer.fusion import FUSION_METHODS
from trainer.paths import cache_dir, resolve_model_dir
from trainer.query.config import TeacherConfig
from trainer.run_file import RENAMED_KEYS, _known_keys, load_config
from trainer.sources.config import SourceConfig

TEACHER = """
[[teachers]]
name = "one"
urls = ["http://127.0.0.1:1"]
"""
PLAIN = """
[student]
model = "m"
[[data.sources]]
files = ["a.txt"]
[output]
dir = "out"
"""


def load(tmp_path: Path, text: str, *sets: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, sets)


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_parses(recipe: Path) -> None:
    assert load_config(recipe).teachers


def test_the_configuration_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, PLAIN + TEACHER)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("[train]\nepoch = 2", "unknown key 'train.epoch'; the nearest known one is 'epochs'"),
        ("[trian]\nepochs = 2", "unknown key 'trian'; the nearest known one is 'train'"),
        ("[train]\nepochs = 0", "train.epochs: .*greater than 0, received 0"),
        (
            '[fusion]\nmethod = "avg"',
            "fusion.method: expected one of mean, geometric, .*fusellm_avg_ce; did you mean 'avg_ce'., received 'avg'",
        ),
        ("[loss]\nce_weight = 1.5", "loss.ce_weight: .*less than or equal to 1, received 1.5"),
        (
            "[train]\nbatch_samples = 4\ngradient_accumulation_steps = 3",
            "train.gradient_accumulation_steps: must divide train.batch_samples",
        ),
        ("[[teachers]]\nname = 'one'\nurls = ['http://x']", "two teachers have the same name"),
        ("[[data.sources]]\nfiles = []", "data.sources.1: expected either files or a dataset"),
        ("[[data.sources]]\nfiles = ['a']\ndataset = 'b'", "data.sources.1: expected either files or a dataset"),
        ("[[data.sources]]\nfiles = ['a']\nsplit = 'b'", "data.sources.1: config_name and split belong to a dataset"),
        (
            "[[data.sources]]\nfiles = ['a']\nfile_format = 'cvs'",
            "data.sources.1.file_format: expected one of text, json, csv, .*did you mean 'csv'.*received 'cvs'",
        ),
        ("[[data.sources]]\ndataset = 'a'\nfile_format = 'csv'", "file_format is the format of files; remove it"),
        (
            "[[data.sources]]\nfiles = ['a']\ntext_column = 'a'\nmessages_column = 'b'",
            "text_column and messages_column are keys of different record formats; remove one",
        ),
        (
            "[[data.sources]]\nfiles = ['a']\ntext_column = 'a'\nrecord_format = 'messages'",
            "record_format 'messages' does not read text_column; remove one",
        ),
        (
            "[[data.sources]]\nfiles = ['a']\nrecord_format = 'template'",
            r"record_format 'template' needs the section \[data.sources.template\]",
        ),
        (
            "[[data.sources]]\nfiles = ['a']\n[data.sources.template]\nprompt = '{a}'\ntext = '{b}'",
            "expected the key text, the keys prompt and completion, or .*received text, prompt",
        ),
        (
            "[[data.sources]]\nfiles = ['a']\n[data.sources.template]\ntext = 'a'",
            "expected at least one column, written as {NAME}",
        ),
        ("[[data.sources]]\nfiles = ['a']\nweigth = 2", "unknown key 'data.sources.1.weigth'; .* 'weight'"),
        ("[fusion]\nmethod = 'router'", "data.sources: fusion by router requires the teacher_column of every source"),
        (
            "[[teachers]]\nname = 'two'\nurl = 'http://x'",
            "unknown key 'teachers.1.url'; the nearest known one is 'urls'",
        ),
        ("[[teachers]]\nname = 'two'", "teachers.1: urls: expected at least one address, or a urls_file"),
        (
            "[[teachers]]\nname = 'two'\nurls = ['http://x']\non_unavailable = 'go'",
            "on_unavailable: .*'wait', 'drop' or 'stop'",
        ),
        (
            "[[teachers]]\nname = 'two'\nurls = ['http://x']\nsignal = 'alm'\n[fusion]\nmethod = 'router'",
            "teachers: teacher two has signal 'alm'; fusion by router requires a target from every teacher",
        ),
        (
            "[[teachers]]\nname = 'two'\nurls = ['http://x']\nsignal = 'bytes'",
            "signal: expected one of byte_chain, em, min_ed, alm, uld, received 'bytes'",
        ),
        ("[loss]\nalpha = 0.2", "loss: divergence forward_kl: takes no parameter, received alpha = 0.2; remove alpha"),
        ("[loss]\ndivergence = 'skew_kl'\nbeta = 0.2", "takes only alpha, received beta = 0.2; remove beta"),
        ("[tracking]\nwandbb = 'p'", "unknown tracker 'wandbb'; the nearest known one is 'wandb'"),
        ("[train\n", "is not TOML"),
    ],
)
def test_errors_name_key_value_and_choices(tmp_path: Path, wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, PLAIN + TEACHER + wrong)


OLD_VALUES = {"teachers.match": "'chain'", "teachers.on_loss": "'wait'", "data.broken_chats": "'skip'"}


def number_keys() -> Iterator[tuple[str, str]]:
    """Yield every numeric key of a run file, and a value that has true in place of a number."""
    for path, section in sections(RunConfig):
        for key, field in section.model_fields.items():
            types = [*leaf_types(field.annotation)]
            if {int, float} & set(types) and bool not in types:
                is_list = get_origin(field.annotation) in (list, tuple)
                yield f"{path}.{key}", str([True] * len(types)).lower() if is_list else "true"


def leaf_types(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    if arguments and get_origin(annotation) is not Literal:
        for argument in arguments:
            yield from leaf_types(argument)
    elif isinstance(annotation, type):
        yield annotation


NUMBERS = [*number_keys(), ("teachers.serve.limits.max_seconds", "true")]  # limits is no section


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_boolean_is_not_accepted_as_a_number(tmp_path: Path, key: str, value: str) -> None:
    key = key.replace("teachers.", "teachers.0.").replace("data.sources.", "data.sources.0.")
    needed = ["teachers.0.serve.model=m"] if ".serve." in key else []
    if key.startswith("data.sources"):
        needed.append("data.sources.0.files=['a.txt']")
    with pytest.raises(ConfigError, match=rf"{key}(\.0)?: .*, received True$"):
        load(tmp_path, PLAIN + TEACHER, *needed, f"{key}={value}")


@pytest.mark.parametrize("key", ["train.seed", "teachers.0.serve.gpus"])
def test_false_is_not_accepted_as_0(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: expected a number, received False$"):
        load(tmp_path, PLAIN + TEACHER, "teachers.0.serve.model=m", f"{key}=false")


def test_all_numeric_keys_are_found() -> None:
    keys = {key for key, _ in NUMBERS}
    assert {"train.seed", "optim.betas", "loss.alpha", "student.lora.rank", "teachers.serve.options.max_top_k"} <= keys
    assert not {"train.deterministic", "data.close_documents", "output.dir"} & keys


@pytest.mark.parametrize("key", RENAMED_KEYS)
def test_a_renamed_key_is_rejected_with_its_new_name(tmp_path: Path, key: str) -> None:
    section, old = key.split(".")
    path = f"{section}.0.{old}" if section == "teachers" else key
    new = RENAMED_KEYS[key].split()[0]
    with pytest.raises(ConfigError, match=rf"unknown key '{path}'; its name is now {new}"):
        load(tmp_path, PLAIN + TEACHER, f"{path}={OLD_VALUES.get(key, '1')}")
    assert new in _known_keys(("teachers", 0) if section == "teachers" else (section,))


def test_importing_the_config_loads_no_heavy_library() -> None:
    heavy = ("numba", "pyarrow", "torch", "httpx", "transformers", "tokenizers", "numpy")
    code = f"import trainer.config, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_error_for_a_missing_run_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the run file .*gone.toml: No such file"):
        load_config(tmp_path / "gone.toml")


def test_a_run_without_teachers_requires_ce_weight_1(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss.ce_weight"):
        load(tmp_path, PLAIN)
    assert load(tmp_path, PLAIN, "loss.ce_weight=1").teachers == []


@pytest.mark.parametrize("method", FUSION_METHODS)
def test_a_baseline_without_teachers_accepts_every_fusion_method(tmp_path: Path, method: str) -> None:
    text = PLAIN.replace("[output]", "teacher_column = 'teacher'\n[output]").replace("a.txt", "a.jsonl") + TEACHER
    assert load(tmp_path, text, f"fusion.method={method}").teachers
    baseline = load(tmp_path, text, f"fusion.method={method}", "teachers=[]", "loss.ce_weight=1")
    assert baseline.teachers == []
    assert baseline.fusion.method == method


def test_overrides_are_toml_values_or_strings(tmp_path: Path) -> None:
    sets = ["train.epochs=7", "output.dir=elsewhere", "teachers.0.urls=['http://a', 'http://b']", "optim.lr=1e-3"]
    config = load(tmp_path, PLAIN + TEACHER, *sets)
    assert config.train.epochs == 7
    assert config.output.dir == "elsewhere"
    assert config.teachers[0].urls == ["http://a", "http://b"]
    assert config.optim.lr == 1e-3


@pytest.mark.parametrize("override", ["train.epochs", "teachers.5.name=x", "student.model.deep=1", "teachers.x=1"])
def test_overrides_of_unknown_keys_are_rejected(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, PLAIN + TEACHER, override)


def test_every_field_has_a_description() -> None:
    sections = [field.annotation for field in RunConfig.model_fields.values()]
    models = [s for s in sections if isinstance(s, type) and issubclass(s, BaseModel)] + [TeacherConfig, SourceConfig]
    assert len(models) == 11
    undocumented = [
        f"{model.__name__}.{name}" for model in models for name, f in model.model_fields.items() if not f.description
    ]
    assert undocumented == []


def test_a_model_is_found_by_path_or_under_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="m is neither a model directory nor a name"):
        resolve_model_dir("m")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert resolve_model_dir("m") == folder
    assert resolve_model_dir(str(folder)) == folder
    with pytest.raises(ConfigError, match="/m/config.json is neither .*: it is a file; write its directory$"):
        resolve_model_dir(str(folder / "config.json"))
    with pytest.raises(ConfigError, match=rf"^{tmp_path} is neither .*: it contains models$"):
        resolve_model_dir(str(tmp_path))
    with pytest.raises(ConfigError, match="which `hf download org/gemma-3` prints$"):
        resolve_model_dir("org/gemma-3")
    with pytest.raises(ConfigError, match=r"^~nosuchuser/m: this user has no home folder; write the whole path$"):
        resolve_model_dir("~nosuchuser/m")


def test_the_reference_of_the_run_file_is_up_to_date() -> None:
    committed = Path("docs/configuration.md").read_text(encoding="utf-8")
    assert committed == reference(), "run `make docs`"


def test_every_key_of_a_run_file_is_described() -> None:
    for path, section in sections(RunConfig):
        for key, field in section.model_fields.items():
            assert field.description, f"{path}.{key}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.seed={2**64}", "train.seed: Input should be less than or equal to"),
        (f"train.epochs={10**30}", "train.epochs: expected at most 2,147,483,647"),
        (f"data.window_tokens={2**63}", "data.window_tokens: expected at most"),
        ("loss.temperature=1e-320", "loss.temperature: expected a number between 1e-12 and 1e"),
        ("optim.lr=1e308", "optim.lr: expected a number between"),
        ('output.dir="a\\u0000b"', "output.dir: expected at most 4,096 characters, none of them NUL"),
        ("output.dir=~nosuchuser/x", "output.dir: this user has no home folder"),
        (f"data.sources.0.files=['{'x' * 300}']", "data.sources.0.files.0: the name of a file or folder has at most"),
        ("student.device=privateuseone", "student.device: expected cpu, cuda or cuda:N, received"),
        ("output.dir=\udcff", "output.dir: expected at most 4,096 characters"),
        ("train.seed=" + "[" * 100_000, "train.seed: Input should be a valid integer"),
        ("output.dir=" + "x" * 10_000_000, r"output.dir: the name of a file .*\(10,000,000 characters\)$"),
    ],
)
def test_values_that_libraries_cannot_take_are_rejected_by_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, PLAIN + TEACHER, override)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"x = " + b"[" * 100_000, b"x = " + b"9" * 100_000, b'x = "\\ud800"', b"a" + b".a" * 20_000 + b"=1"],
)
@pytest.mark.slow
def test_a_run_file_that_is_not_toml_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(text)
    with pytest.raises(ConfigError, match=r"run\.toml(:| is not TOML)"):
        load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    "keys",
    [
        'urls = ["http://user:hunter2@127.0.0.1:1"]',
        'urls = ["dns+http://hunter2@host:1"]',
        'urls = ["http://127.0.0.1:1/?token=hunter2"]',
        'urls = ["http://[hunter2"]',
        'urls = ["http://h"]\nkey_env = "sk-hunter2"',
        'key_env = "KEY"\nname2 = "hunter2"',
        "name = 5\nkey_env = ['hunter2']",
    ],
)
def test_an_error_repeats_no_secret(tmp_path: Path, keys: str) -> None:
    name = "" if "name =" in keys else 'name = "t"\n'
    (tmp_path / "run.toml").write_text(f"{PLAIN}\n[[teachers]]\n{name}{keys}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.toml")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', expected a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', expected a number"),
        ({"RANK": "-1"}, "RANK is '-1', expected a number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "not below it"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_variables_of_torchrun_that_make_no_sense_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), process_group("cpu"):
        pass


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUTELAGE_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert cache_dir().name == "tutelage-54321"
