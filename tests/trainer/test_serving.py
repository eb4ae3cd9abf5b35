"""From a run file's [teachers.serve] to what Ray Serve is told, without Ray."""

from pathlib import Path

import pytest

from teachers.engine import EngineOptions
from teachers.models import model_folder
from teachers.ray_options import ServeOptions
from trainer.commands.serve import served_teachers
from trainer.errors import ConfigError
from trainer.run_file import load_config

RECIPE = Path(__file__).parents[2] / "recipes" / "ray.toml"


def test_a_teacher_is_served_with_the_key_that_the_run_brings() -> None:
    key = ['teachers.0.key_env="ONE"', 'teachers.1.key_file="one.key"', 'teachers.1.serve.key_file="two.key"']
    served = served_teachers(load_config(RECIPE, key))
    assert (served["smollm2"].key_env, served["smollm2"].key_file) == ("ONE", None)
    assert (served["gemma"].key_env, served["gemma"].key_file) == (None, "two.key")


def test_an_address_where_ray_does_not_serve_the_teacher_is_refused() -> None:
    for url in ("http://127.0.0.1:8000", "http://127.0.0.1:8000/gemma"):
        with pytest.raises(ConfigError, match="teacher smollm2: Ray serves it at http://HOST:PORT/smollm2"):
            served_teachers(load_config(RECIPE, [f'teachers.0.urls=["{url}"]']))
    by_handle = load_config(RECIPE, ['teachers.0.urls=["serve://smollm2"]'])
    assert list(served_teachers(by_handle)) == ["smollm2", "gemma"]


def test_a_run_file_without_served_teachers_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to serve"):
        served_teachers(load_config(RECIPE.with_name("demo.toml")))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gpus=2", "gpus is 2 and options.tensor_parallel 1"),
        ("options={tensor_parallel=2}", "gpus is 0 and options.tensor_parallel 2"),
        ("options={dtpe='float32'}", "teachers.0.serve.options.dtpe"),
        ("replica=2", "the nearest known one is 'replicas'"),
        ("max_replicas=0", "max_replicas"),
        ("key_env='K'", None),
    ],
)
def test_options_that_contradict_are_refused_by_name(override: str, says: str | None) -> None:
    key, value = override.split("=", 1)
    sets = [f"teachers.0.serve.{key}={value}", *([] if says else ["teachers.0.serve.key_file='F'"])]
    with pytest.raises(ConfigError, match=says or "key_file and key_env: expected one of them"):
        load_config(RECIPE, sets)


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValueError, match="max_replicas is 2, expected at least replicas, 3"):
        ServeOptions(model="m", replicas=3, max_replicas=2)
    options = ServeOptions(model="m", gpus=2, options=EngineOptions(tensor_parallel=2))
    assert options.gpus == options.options.tensor_parallel


def test_a_model_is_a_folder_or_a_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path))
    (tmp_path / "models" / "m").mkdir(parents=True)
    assert model_folder("m") == tmp_path / "models" / "m"
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder("absent") == Path("absent")
