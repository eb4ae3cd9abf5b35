"""[teachers.serve] in a run file, and the options of Ray Serve that result from it; without Ray."""

from pathlib import Path

import pytest

from teachers.engines import ENGINES, options_class
from teachers.engines.transformers_options import TransformersOptions
from teachers.engines.vllm_options import VllmOptions
from teachers.model_dirs import model_dir
from teachers.server.ray_options import RayServeOptions, serve_config
from trainer.cli.ray_teachers import served_teachers
from trainer.errors import ConfigError
from trainer.run_file import load_config

RECIPE = Path(__file__).parents[2] / "recipes" / "ray.toml"


def test_a_teacher_is_served_with_the_key_that_the_run_sends() -> None:
    key = ['teachers.0.key_env="ONE"', 'teachers.1.key_file="one.key"', 'teachers.1.serve.key_file="two.key"']
    served = served_teachers(load_config(RECIPE, key))
    assert (served["smollm2"].key_env, served["smollm2"].key_file) == ("ONE", None)
    assert (served["gemma"].key_env, served["gemma"].key_file) == (None, "two.key")


def test_an_address_other_than_ray_serves_is_rejected() -> None:
    for url in ("http://127.0.0.1:8000", "http://127.0.0.1:8000/gemma"):
        with pytest.raises(ConfigError, match="teacher smollm2: Ray Serve provides it at http://HOST:PORT/smollm2"):
            served_teachers(load_config(RECIPE, [f'teachers.0.urls=["{url}"]']))
    by_handle = load_config(RECIPE, ['teachers.0.urls=["serve://smollm2"]'])
    assert list(served_teachers(by_handle)) == ["smollm2", "gemma"]


def test_a_run_file_without_served_teachers_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"no teacher of this run file has a section \[teachers.serve\]"):
        served_teachers(load_config(RECIPE.with_name("demo.toml")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpus=2"], "gpus is 2, but engine transformers uses 1 with these options"),
        (["engine='vllm'", "gpus=2"], "gpus is 2, but engine vllm uses 1 with these options"),
        (["engine='vllm'", "options={tensor_parallel=2}"], "gpus is 0, but engine vllm uses 2 with these options"),
        (["engine='vlm'"], "teachers.0.serve.engine: expected one of transformers, vllm, received 'vlm'"),
        (["replica=2"], "the nearest known one is 'replicas'"),
        (["max_replicas=0"], "max_replicas"),
        (["key_env='K'", "key_file='F'"], "key_file and key_env: expected one of them"),
    ],
)
def test_contradicting_options_are_rejected_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, [f"teachers.0.serve.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("transformers", "max_top_k=-5", "options.max_top_k: Input should be greater than or equal to 1"),
        ("transformers", "max_tokens=0", "options.max_tokens: Input should be greater than or equal to 2"),
        ("transformers", "max_tokens=1", "options.max_tokens: Input should be greater than or equal to 2"),
        ("transformers", "batch_tokens=-1", "options.batch_tokens: Input should be greater than or equal to 0"),
        ("vllm", "tensor_parallel=0", "options.tensor_parallel: Input should be greater than or equal to 1"),
        ("transformers", "dtype='int8'", "options.dtype: Input should be 'auto', 'bfloat16' or 'float32'"),
        ("transformers", "dtpe='float32'", "options.dtpe: unknown option, .*the nearest known one is 'dtype'"),
        ("transformers", "tensor_parallel=1", "options.tensor_parallel: unknown option, expected one of dtype, bos,"),
        ("vllm", "device='cuda:1'", "options.device: unknown option, expected one of dtype, bos,"),
        ("vllm", "batch_tokens=512", "options.batch_tokens: unknown option, expected one of dtype, bos,"),
    ],
)
def test_invalid_engine_options_are_rejected_by_name(engine: str, options: str, message: str) -> None:
    overrides = [f"teachers.0.serve.engine='{engine}'", f"teachers.0.serve.options={{{options}}}"]
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, overrides)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_has_default_options(engine: str) -> None:
    assert type(RayServeOptions(model="m", engine=engine).options) is options_class(engine)


def test_the_options_of_another_engine_are_rejected() -> None:
    with pytest.raises(ValueError, match="expected VllmOptions for engine vllm"):
        RayServeOptions(model="m", engine="vllm", options=TransformersOptions())


def test_max_replicas_below_replicas_are_rejected() -> None:
    with pytest.raises(ValueError, match="max_replicas is 2, expected at least replicas, 3"):
        RayServeOptions(model="m", replicas=3, max_replicas=2)


def test_engine_options_survive_the_configuration_of_ray_serve() -> None:
    options = RayServeOptions(model="m", engine="vllm", gpus=2, options=VllmOptions(tensor_parallel=2, max_top_k=7))
    (served,) = serve_config({"t": options}, "127.0.0.1", 8000)["applications"]
    assert served["args"] == {
        "model": "m", "engine": "vllm", "gpus": 2.0, "options": {"tensor_parallel": 2, "max_top_k": 7}
    }  # fmt: skip
    assert RayServeOptions.model_validate(served["args"]) == options


def test_vllm_starts_its_own_workers_inside_ray() -> None:
    assert VllmOptions().for_ray() == VllmOptions()
    several = VllmOptions(tensor_parallel=2, vllm_args={"seed": 3})
    assert several.for_ray().vllm_args == {"distributed_executor_backend": "mp", "seed": 3}
    assert VllmOptions(tensor_parallel=2, vllm_args={"distributed_executor_backend": "ray"}).for_ray().vllm_args == {
        "distributed_executor_backend": "ray"
    }


def test_a_model_is_a_directory_or_a_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path))
    (tmp_path / "models" / "m").mkdir(parents=True)
    assert model_dir("m") == tmp_path / "models" / "m"
    assert model_dir(str(tmp_path)) == tmp_path
    assert model_dir("unavailable") == Path("unavailable")
