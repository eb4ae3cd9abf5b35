"""A few MB of real text without a hub: what the docstrings of pinned packages say, a document each.

They are read out of the packages' files, which are never imported; constraints.txt pins the packages, so the text is
the same everywhere.
"""

import ast
import inspect
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sklearn", "networkx", "sympy")
SHORTEST = 600  # characters of a document
SHARED_PARAGRAPH = 120  # a docstring with a paragraph of this many characters that was there before is left out
Defined = ast.Module | ast.ClassDef | ast.FunctionDef


def save_docstrings(path: Path) -> Path:
    """A .jsonl of name, text and domain, which is the package; made unless it is there."""
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
    """Where each one stands, and its text. `seen` holds the long paragraphs so far, and grows."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install '.[dev]'")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node, clean=False) if isinstance(node, Defined) else None
            if text is None or len(text) < SHORTEST:
                continue
            text = inspect.cleandoc(text)
            paragraphs = {p for p in text.split("\n\n") if len(p) >= SHARED_PARAGRAPH}
            if not paragraphs & seen:
                seen |= paragraphs
                yield f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 1)}", text
