"""Rules for the repository itself: names, imports, commands, sizes, and generated or listed documentation."""

import ast
import importlib
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from trainer.cli.__main__ import app
from trainer.component_reference import component_reference
from trainer.config import RunConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("alignment", "kernel_cache", "teachers", "trainer")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_FILES = sorted([*FILES, *(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))])


def names(text: str) -> frozenset[str]:
    """Return the names that a text lists."""
    return frozenset(text.split())


# Words that must not occur in names of files, classes, functions, methods and parameters.
REMOVED_WORDS = names(
    """ahead apart asking fleet heard hear hears lesson lessons roster spelling spellings straggler stragglers
    taught told twin twins unaligned"""
)
# Complete names. Their words have other meanings elsewhere: `read` is a method of files, `NotFound` an error.
REMOVED_CLASSES = names("Answer Asked Broken Found Outcome Pace Part Parts Pass Place Places Read Reader Reading Room")
REMOVED_MODULES = names("answer part parts places reading serving")
REMOVED_FUNCTIONS = names(
    "accumulate agreed find_model gathered halve_frozen keeps_apart one_before_the_others parts place places stalled"
)
REMOVED_PARAMETERS = names("keeps_apart on_loss part_shares patience_s prior_N shares_N static_N stop_after")
REMOVED_KEYS = names("accumulate broken_chats match max_broken mix on_loss patience_s stalled stop_after stop_margin")
REMOVED_COMMANDS = names("ask fuse teach twin")
REMOVED_COLLECTIVES = names("agreed gathered one_before_the_others part sum")


def name_words(name: str) -> set[str]:
    """Return the words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def definitions(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (kind, name, line) of the module and of every class, function and parameter that it defines."""
    yield "module", path.stem, 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            yield "class", node.name, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "function", node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield "parameter", node.arg, node.lineno


REMOVED = {
    "module": REMOVED_MODULES,
    "class": REMOVED_CLASSES,
    "function": REMOVED_FUNCTIONS,
    "parameter": REMOVED_PARAMETERS,
}


def removed_names(path: Path) -> list[str]:
    """Return every definition of a file that has a removed name."""
    return [
        f"{path}:{line}: {kind} {name}"
        for kind, name, line in definitions(path)
        if name.strip("_") in REMOVED[kind] or name_words(name) & REMOVED_WORDS
    ]


def config_keys(section: type[BaseModel]) -> Iterator[str]:
    """Yield every key of a section and of the sections inside it."""
    for name, info in section.model_fields.items():
        yield name
        pending = [info.annotation]
        while pending:
            annotation = pending.pop()
            pending += get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from config_keys(annotation)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imported_packages_are_those_of_the_repository(package: str) -> None:
    assert Path(str(importlib.import_module(package).__file__)).parent == ROOT / package


def test_clients_alignment_and_config_import_no_torch_and_no_server() -> None:
    heavy = ("torch", "transformers", "fastapi", "uvicorn", "prometheus_client", "ray", "vllm")
    light = "teachers.client.pool, alignment, trainer.config, trainer.launch.ray_worker"
    code = f"import {light}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_takes_at_most_twice_the_cpu_time_of_its_libraries() -> None:
    """It takes 0.2 s on an idle machine; a ratio holds on a busy one too. An import of torch takes seconds."""

    def cpu_seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries = "import typer.main, rich.console, rich.table, rich.panel, rich.markdown"
    times = [(cpu_seconds("-m", "trainer.cli", "--help"), cpu_seconds("-c", libraries)) for _ in range(7)]
    assert min(help_s for help_s, _ in times) <= 2 * min(libraries_s for _, libraries_s in times)


def test_threads_of_the_command_do_not_spin_while_they_wait() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    code = [sys.executable, "-c", "import trainer.cli.app, torch"]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '0'" in done.stderr  # the default is 300000


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_source_file_has_a_docstring_and_at_most_300_lines(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 300


def test_only_the_console_prints() -> None:
    for path in FILES:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


# --- names ---


def test_no_definition_has_a_removed_name() -> None:
    assert [found for path in ALL_FILES for found in removed_names(path)] == []


def test_no_folder_has_a_removed_name() -> None:
    folders = {part for path in ALL_FILES for part in path.relative_to(ROOT).parent.parts}
    assert not folders & (REMOVED_WORDS | REMOVED_MODULES)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class Lesson: ...", ["class Lesson"]),
        ("class TwinRun: ...", ["class TwinRun"]),
        ("class _Reader: ...", ["class _Reader"]),
        ("class NotFound: ...", []),
        ("class Placement: ...", []),
        ("def hear(): ...", ["function hear"]),
        ("def _keeps_apart(): ...", ["function _keeps_apart"]),
        ("async def f(prior_N, read): ...", ["parameter prior_N"]),
        ("class File:\n    def read(self): ...\n    def replace(self): ...", []),
        ("import itertools\nfound = itertools.accumulate([1])\nmatch found:\n    case _: pass", []),
    ],
)
def test_removed_names_are_found_in_definitions_only(tmp_path: Path, source: str, found: list[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(source + "\n", encoding="utf-8")
    assert [line.partition(": ")[2] for line in removed_names(path)] == found


def test_no_config_key_has_a_removed_name() -> None:
    keys = set(config_keys(RunConfig))
    assert {"gradient_accumulation_steps", "unavailable_timeout_s", "signal", "early_stopping_patience"} <= keys
    assert not keys & REMOVED_KEYS
    assert not {word for key in keys for word in name_words(key)} & REMOVED_WORDS


def test_no_visible_command_or_option_has_a_removed_name() -> None:
    from typer.main import get_command

    group = get_command(app)
    commands = {name: command for name, command in vars(group)["commands"].items() if not command.hidden}
    options = {option for command in commands.values() for p in command.params for option in p.opts}
    assert {"serve", "serve-ray", "train"} <= commands.keys()
    assert not commands.keys() & REMOVED_COMMANDS
    assert "--baseline" in options
    assert not {word for name in [*commands, *options] for word in name_words(name)} & REMOVED_WORDS


def test_no_collective_has_a_removed_name() -> None:
    functions = {name for kind, name, _ in definitions(ROOT / "trainer" / "distributed.py") if kind == "function"}
    assert {"shard", "broadcast", "all_gather", "all_reduce_sum", "local_rank_zero_first"} <= functions
    assert not functions & REMOVED_COLLECTIVES


# --- documentation ---


def test_the_file_map_lists_every_file_of_the_packages_once() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([^`]+)` — \S", page, re.MULTILINE)
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    files = [str(p.relative_to(ROOT)) for p in paths if p.name != "__init__.py" and "__pycache__" not in p.parts]
    assert sorted(listed) == sorted(files)


def test_the_page_of_components_is_up_to_date() -> None:
    page = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    assert page == component_reference(), "run `make docs`"


def test_the_readme_is_short_and_its_first_sentence_names_the_field() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(readme.splitlines()) <= 150
    sentence = " ".join(readme.split("\n\n")[1].split()).partition(". ")[0]
    for text in (sentence, project["description"]):
        for term in ("knowledge distillation", "multi-teacher", "cross-tokenizer", "vLLM", "Ray"):
            assert term in text
