"""A few MB of real text without a download: the docstrings of pinned packages, one document each.

The docstrings are parsed from the source files of the packages, which are not imported. constraints.txt pins the
packages, so the text is the same everywhere.
"""

import ast
import inspect
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sklearn", "networkx", "sympy")
SHORTEST = 600  # minimum characters of a document
SHARED_PARAGRAPH = 120  # minimum characters of a paragraph; a docstring that repeats one is left out
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def save_docstrings(path: Path) -> Path:
    """Write a .jsonl with name, text and domain (the package), unless the file exists; return its path."""
    if not path.exists():
        seen: set[str] = set()
        partial = path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for package in PACKAGES:
                for name, text in docstrings(package, seen):
                    file.write(json.dumps({"name": name, "text": text, "domain": package}) + "\n")
        partial.rename(path)
    return path


def docstrings(package: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the location and the text of each docstring. Long paragraphs are added to `seen`."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install '.[dev]'")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node, clean=False) if isinstance(node, DOCUMENTED) else None
            if text is None or len(text) < SHORTEST:
                continue
            text = inspect.cleandoc(text)
            paragraphs = {p for p in text.split("\n\n") if len(p) >= SHARED_PARAGRAPH}
            if not paragraphs & seen:
                seen |= paragraphs
                yield f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 1)}", text
