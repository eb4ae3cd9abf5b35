"""The house itself: names, imports, commands, recipes."""

import ast
import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("alignment", "teachers", "trainer")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imported_packages_are_ours(package: str) -> None:
    assert Path(str(importlib.import_module(package).__file__)).parent == ROOT / package


def test_the_asking_side_imports_without_torch() -> None:
    heavy = ("torch", "transformers", "fastapi", "uvicorn", "prometheus_client", "ray", "vllm")
    code = (
        f"import teachers.asking.pool, alignment, trainer.config, sys; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_there_in_half_a_second() -> None:
    def took() -> float:
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "trainer.cli", "--help"], capture_output=True, check=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # of CPU: other tests run beside this one
        return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime

    assert min(took() for _ in range(5)) < 0.5


def test_threads_of_the_command_do_not_spin_while_they_wait() -> None:
    asked = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    code = [sys.executable, "-c", "import trainer.cli, torch"]
    done = subprocess.run(code, env=asked | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '0'" in done.stderr  # 300000 by itself


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_why_it_exists_and_stays_a_room(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 400


def test_nothing_but_the_console_prints() -> None:
    for path in FILES:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path
