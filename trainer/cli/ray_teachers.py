"""The teachers of a run file that `tutelage serve-ray` starts on Ray Serve."""

from urllib.parse import urlsplit

from teachers.server.ray_options import RayServeOptions, route_prefix
from trainer.config import RunConfig
from trainer.errors import ConfigError


def served_teachers(config: RunConfig) -> dict[str, RayServeOptions]:
    """Return the options of each teacher with a [teachers.serve] section, by name.

    A teacher without its own key accepts the key that the run sends.


    Raises ConfigError if there is no such teacher, or if the run uses another address than Ray Serve provides.
    """
    teachers = {}
    for teacher in config.teachers:
        if teacher.serve is None:
            continue
        for url in teacher.urls:
            if not url.startswith("serve://") and urlsplit(url).path.rstrip("/") != route_prefix(teacher.name):
                expected = f"http://HOST:PORT{route_prefix(teacher.name)}"
                raise ConfigError(f"teacher {teacher.name}: Ray Serve provides it at {expected}, but its url is {url}")
        keys = {"key_env": teacher.key_env, "key_file": teacher.key_file}
        own_key = teacher.serve.key_env or teacher.serve.key_file
        teachers[teacher.name] = teacher.serve if own_key else teacher.serve.model_copy(update=keys)
    if not teachers:
        raise ConfigError("no teacher of this run file has a section [teachers.serve]: add one per teacher to serve")
    return teachers
