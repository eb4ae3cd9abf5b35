"""`tutelage serve`: the teachers of a run file on Ray Serve."""

from urllib.parse import urlsplit

from teachers.ray_options import ServeOptions, route_prefix
from trainer.config import RunConfig
from trainer.errors import ConfigError


def served_teachers(config: RunConfig) -> dict[str, ServeOptions]:
    """Each teacher that has a [teachers.serve], by name; a key is asked for where the run brings one.

    Raises ConfigError if there is none, or if the run would ask elsewhere than Ray answers.
    """
    teachers = {}
    for teacher in config.teachers:
        if teacher.serve is None:
            continue
        for url in teacher.urls:
            if not url.startswith("serve://") and urlsplit(url).path.rstrip("/") != route_prefix(teacher.name):
                expected = f"http://HOST:PORT{route_prefix(teacher.name)}"
                raise ConfigError(f"teacher {teacher.name}: Ray serves it at {expected}, its urls say {url}")
        keys = {"key_env": teacher.key_env, "key_file": teacher.key_file}
        own_key = teacher.serve.key_env or teacher.serve.key_file
        teachers[teacher.name] = teacher.serve if own_key else teacher.serve.model_copy(update=keys)
    if not teachers:
        raise ConfigError("no teacher of this run file has a [teachers.serve]: there is nothing to serve")
    return teachers
