"""The run file: what it takes, and how it refuses."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer.config import RunConfig, SourceConfig, TeacherConfig
from trainer.errors import ConfigError
from trainer.places import find_model
from trainer.run_file import load_config

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


def test_it_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, PLAIN + TEACHER)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("[train]\nepoch = 2", "unknown key 'train.epoch'; the nearest known one is 'epochs'"),
        ("[trian]\nepochs = 2", "unknown key 'trian'; the nearest known one is 'train'"),
        ("[train]\nepochs = 0", "train.epochs: .*greater than 0, received 0"),
        ('[fusion]\nmethod = "avg"', "fusion.method: .*'mean', 'geometric', .*'fusellm_avg_ce', received 'avg'"),
        ("[loss]\nce_weight = 1.5", "loss.ce_weight: .*less than or equal to 1, received 1.5"),
        ("[train]\nbatch_samples = 4\naccumulate = 3", "train.accumulate: must divide train.batch_samples"),
        ("[[teachers]]\nname = 'one'\nurls = ['http://x']", "two teachers have the same name"),
        ("[[data.sources]]\nfiles = []", "data.sources.1: expected either files or a dataset"),
        ("[[data.sources]]\nfiles = ['a']\ndataset = 'b'", "data.sources.1: expected either files or a dataset"),
        ("[[data.sources]]\nfiles = ['a']\nsplit = 'b'", "data.sources.1: config_name and split belong to a dataset"),
        ("[[data.sources]]\nfiles = ['a']\nweigth = 2", "unknown key 'data.sources.1.weigth'; .* 'weight'"),
        ("[fusion]\nmethod = 'router'", "data.sources: fusion by router needs the teacher_column of every source"),
        (
            "[[teachers]]\nname = 'two'\nurl = 'http://x'",
            "unknown key 'teachers.1.url'; the nearest known one is 'urls'",
        ),
        ("[[teachers]]\nname = 'two'", "teachers.1: urls: expected at least one address, or a urls_file"),
        ("[[teachers]]\nname = 'two'\nurls = ['http://x']\non_loss = 'go'", "on_loss: .*'wait', 'drop' or 'stop'"),
        (
            "[[teachers]]\nname = 'two'\nurls = ['http://x']\nmatch = 'spans'\n[fusion]\nmethod = 'router'",
            "teachers: teacher two is matched by spans; fusion by router needs a target from each of them",
        ),
        (
            "[[teachers]]\nname = 'two'\nurls = ['http://x']\nmatch = 'sorted'\n"
            "[[data.sources]]\nfiles = ['c.jsonl']\nmessages_column = 'm'",
            "teachers: teacher two is matched by sorted, which is for texts; chats are matched by chain",
        ),
        (
            "[[teachers]]\nname = 'two'\nurls = ['http://x']\nmatch = 'bytes'",
            "'chain', 'em', 'min_ed', 'spans' or 'sorted'",
        ),
        ("[train\n", "is not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, wrong: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, PLAIN + TEACHER + wrong)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the run file .*gone.toml: No such file"):
        load_config(tmp_path / "gone.toml")


def test_without_teachers_only_the_text_can_be_learned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss.ce_weight"):
        load(tmp_path, PLAIN)
    assert load(tmp_path, PLAIN, "loss.ce_weight=1").teachers == []


def test_overrides_are_toml_values_or_strings(tmp_path: Path) -> None:
    sets = ["train.epochs=7", "output.dir=elsewhere", "teachers.0.urls=['http://a', 'http://b']", "optim.lr=1e-3"]
    config = load(tmp_path, PLAIN + TEACHER, *sets)
    assert config.train.epochs == 7
    assert config.output.dir == "elsewhere"
    assert config.teachers[0].urls == ["http://a", "http://b"]
    assert config.optim.lr == 1e-3


@pytest.mark.parametrize("override", ["train.epochs", "teachers.5.name=x", "student.model.deep=1", "teachers.x=1"])
def test_overrides_of_no_place_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(tmp_path, PLAIN + TEACHER, override)


def test_every_field_says_what_it_means() -> None:
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
        find_model("m")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert find_model("m") == folder
    assert find_model(str(folder)) == folder
