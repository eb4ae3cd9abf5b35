"""The cache of compiled kernels: loaded if the digest is correct, compiled again otherwise."""

import importlib.util
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernel_cache.compiled import SUFFIX

SOURCE = """
from kernel_cache.compiled import compiled

@compiled
def double(x):
    return 2 * x

@compiled
def total(n):
    return sum([double(i) for i in range(n)])
"""
NUM_FLIPS = 12
_numbers = itertools.count()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "kernels.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def load(source: Path) -> Any:
    """Import the source as a new module, as another process would."""
    spec = importlib.util.spec_from_file_location(f"kernels_{next(_numbers)}", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_loaded(kernel: Any) -> bool:
    """Return whether the last call used the cache instead of compiling."""
    return bool(kernel.stats.cache_hits)


def files(source: Path, kernel: str = "total") -> list[Path]:
    return sorted((source.parent / "__pycache__").glob(f"kernels.{kernel}-*{SUFFIX}"))


def test_a_kernel_is_compiled_once_per_signature(source: Path) -> None:
    first = load(source)
    assert first.total(5) == 20
    assert not is_loaded(first.total)
    (path,) = files(source)
    again = load(source)
    assert again.total(5) == 20
    assert is_loaded(again.total)
    assert load(source).double(1.5) == 3.0
    assert len(files(source, "double")) == 2
    assert files(source) == [path]


def test_one_flipped_bit_anywhere_leads_to_another_compilation(source: Path) -> None:
    load(source).double(7)
    (path,) = files(source, "double")
    intact = path.read_bytes()
    for place in {0, 31, 32, 33, len(intact) - 1} | {i * len(intact) // NUM_FLIPS for i in range(NUM_FLIPS)}:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        module = load(source)
        assert module.double(7) == 14
        assert not is_loaded(module.double)
        again = load(source)
        assert again.double(7) == 14
        assert is_loaded(again.double)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 5000])
def test_a_file_that_does_not_verify_is_not_unpickled(source: Path, tmp_path: Path, content: bytes) -> None:
    class Pickled:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "ran",)  # type: ignore[return-value]

    load(source).double(7)
    (path,) = files(source, "double")
    for data in (content, path.read_bytes()[:32] + pickle.dumps(Pickled())):
        path.write_bytes(data)
        assert load(source).double(7) == 14
    assert not (tmp_path / "ran").exists()


def test_a_changed_source_is_compiled_again(source: Path) -> None:
    assert load(source).double(7) == 14
    source.write_text(SOURCE.replace("2 * x", "x + x + 1"), encoding="utf-8")
    module = load(source)
    assert module.double(7) == 15
    assert len(files(source, "double")) == 1


def test_a_cache_that_cannot_be_written_or_read_is_done_without(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = load(source)
    cache = source.parent / "__pycache__"
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.write_text("", encoding="utf-8")
    assert module.double(7) == 14
    assert "its kernels are not cached" in caplog.text
    cache.unlink()
    module = load(source)
    assert module.double(7) == 14
    (path,) = files(source, "double")
    path.unlink()
    path.mkdir()
    assert load(source).double(7) == 14
    assert "cannot be read (" in caplog.text


@pytest.mark.slow
def test_several_processes_may_compile_at_once(source: Path) -> None:
    code = "import kernels; print([kernels.total(n) for n in (3, 4)], kernels.double(0.5), kernels.double(2))"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=source.parent, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=120)[0] for process in processes} == {"[6, 12] 1.0 4\n"}
    assert len(files(source, "double")) == 2
    code = (
        "import kernels; kernels.double(2); kernels.double(0.5); print(sum(kernels.double.stats.cache_hits.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
