"""Untrusted tokenizer files: every file gives a vocabulary or a one-sentence TokenizerError."""

import base64
import copy
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment import TokenizerError, Vocabulary
from alignment.tokenizers import limits, trial
from alignment.tokenizers.limits import MAX_FILE_BYTES
from alignment.tokenizers.trial import try_tokenizer
from tests.tiny import TEXT, Kind, tokenizer_config, tokenizer_json

Change = Callable[[dict[str, Any]], Any]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
GROWING = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 50}


def charsmap(trie: bytes, replacements: bytes) -> dict[str, Any]:
    data = len(trie).to_bytes(4, "little") + trie + replacements
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def add(**fields: Any) -> Change:
    return lambda spec: spec["added_tokens"].append({"content": "<boom>", **FLAGS, **fields})


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


HOSTILE: dict[str, tuple[Change, str]] = {
    "large added id": (add(id=2_000_000_000), "the largest id is 2000000000"),
    "large id": (lambda s: s["model"]["vocab"].update(zzz=1_500_000_000), "the largest id is 1500000000"),
    "negative id": (add(id=-7), "expected ids of 0 and above, received '-7'"),
    "id of another type": (lambda s: s["model"]["vocab"].update(zzz=None), "received 'None'"),
    "long token": (lambda s: s["model"]["vocab"].update({"x" * 5000: 420}), "a token has 5000 characters"),
    "growing chain": (lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [GROWING] * 5}), "by 6.25e.08"),
    "growth by a regular expression": (
        lambda s: s.update(normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "e" * 100}),
        "multiply a text by 200",
    ),
    "long prefix": (lambda s: s.update(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "1000000 characters"),
    "long replacement": (lambda s: s.update(normalizer=charsmap(b"\0" * 8, b"y" * 999)), "character by 999 bytes"),
    "truncated charsmap": (lambda s: s.update(normalizer=charsmap(b"", b"")), "charsmap is truncated"),
    "charsmap of garbage": (lambda s: s.update(normalizer=charsmap(b"\xff" * 4, b"abc")), "cannot be read"),
    "regular expression": (lambda s: s.update(pre_tokenizer=split("(a*)*b|(.*)*x")), "cannot be read"),
    "wrong regular expression": (lambda s: s.update(pre_tokenizer=split("(")), "cannot be read"),
    "empty pattern": (
        lambda s: s.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
        "cannot be read",
    ),
    "random merges": (lambda s: s["model"].update(dropout=0.5), "drops merges at random"),
    "unknown token": (lambda s: s["model"].update(unk_id=10**9), "unk_id is 1000000000"),
    "no model": (lambda s: s.pop("model"), "KeyError"),
    "list as model": (lambda s: s.update(model=[1, 2]), "cannot be read"),
    "merges": (lambda s: s["model"].update(merges=[["q", "r", "s"]]), "cannot be read"),
}


def spec_of(kind: Kind = "byte_level") -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer_json(kind))
    return spec


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_one_sentence(change: Change, reason: str) -> None:
    spec = spec_of()
    change(spec)
    with pytest.raises(TokenizerError, match=f"the tokenizer of evil cannot be read: .*{reason}|{reason}") as caught:
        Vocabulary.parse(json.dumps(spec).encode(), name="evil")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"\xff\xfe", b'{"a":' + b"[" * 100_000, b"9" * 10_000],
    ids=["empty", "list", "latin", "deep", "int"],
)
def test_a_damaged_file_is_refused_in_one_sentence(data: bytes) -> None:
    for files in ((data, b"{}"), (tokenizer_json("byte_level").encode(), data)):
        with pytest.raises(TokenizerError, match="the tokenizer of evil cannot be read"):
            Vocabulary.parse(*files, name="evil")


def test_a_file_above_the_limit_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    began = time.monotonic()
    with pytest.raises(TokenizerError, match=f"tokenizer.json has {MAX_FILE_BYTES + 1} bytes or more, expected"):
        Vocabulary.load(tmp_path)
    assert time.monotonic() - began < 2


def test_a_panic_of_a_later_text_is_a_tokenizer_error() -> None:
    spec = spec_of()
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split("QQ(a|a)*[bc]"), spec["pre_tokenizer"]]}
    vocabulary = Vocabulary.parse(json.dumps(spec).encode(), name="evil")
    text = "QQ" + "a" * 60
    for call in (vocabulary.encode, vocabulary.encode_rendered, lambda t: vocabulary.num_tokens([t])):
        with pytest.raises(TokenizerError, match="the tokenizer of evil cannot write a text"):
            call(text)
    assert len(vocabulary.encode("plain"))


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the cached results of earlier trials."""
    monkeypatch.setattr(trial, "_results", {})


@pytest.mark.usefixtures("forgotten")
def test_files_of_a_teacher_are_tried_once_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    run = subprocess.run

    def counted(*args: Any, **options: Any) -> Any:
        runs.append(args)
        return run(*args, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    files = {"tokenizer.json": tokenizer_json("byte_level").encode()}
    assert len(Vocabulary.from_files(files, name="a")) == len(Vocabulary.from_files(files, name="b")) > 400
    assert len(runs) == 1


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import time; time.sleep(60)", "loading it took more than 0.5 s"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"loading it exceeded the limits of memory or time \(signal 9\)",
        ),
        ("import sys; sys.exit(3)", "the process that tried it ended with 3"),
    ],
)
def test_a_trial_that_ends_or_takes_long_refuses_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(trial, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(trial, "TIMEOUT_S", 0.5)
    with pytest.raises(TokenizerError, match=f"the tokenizer of evil cannot be read: {reason}"):
        try_tokenizer(b"{}", "evil")


def test_a_trial_imports_little_and_is_fast() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(trial.SCRIPT)], check=True, capture_output=True)
    assert not [name for name in ("numpy", "numba", "alignment", "torch") if f"'{name}'" in done.stdout.decode()]
    began = time.monotonic()
    assert trial._run_script([], tokenizer_json("byte_level").encode(), trial.TIMEOUT_S) == {}
    assert time.monotonic() - began < 5  # 0.25 s on an idle machine


VALUES = [None, True, 0, -1, 419, 10**6, 2**31, 2**63, 10**30, 1.5, "", "x", "▁", "Ġ", [], {}, [1], {"type": "Nope"}]


def mutate(value: Any, rng: random.Random) -> None:
    """Replace or delete one random part of a JSON object, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            value = inner
        elif rng.random() < 0.2:
            del value[key]
            return
        else:
            value[key] = copy.deepcopy(rng.choice(VALUES))
            return


def test_mutated_files_give_a_vocabulary_or_a_tokenizer_error() -> None:
    rng, outcomes = random.Random(0), {"ok": 0, "refused": 0}
    kinds: tuple[Kind, ...] = ("byte_level", "sentencepiece")
    for n in range(300):
        kind = kinds[n % 2]
        spec, config = spec_of(kind), copy.deepcopy(tokenizer_config(kind))
        for _ in range(rng.choice((1, 1, 2, 3))):
            mutate(spec if rng.random() < 0.8 else config, rng)
        try:
            vocabulary = Vocabulary.parse(json.dumps(spec).encode(), json.dumps(config).encode(), name="evil")
            vocabulary.encode(TEXT[:200])
            outcomes["ok"] += 1
        except TokenizerError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_the_growth_of_common_normalizers_is_within_the_limit() -> None:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    charsmap_ = charsmap(b"\0" * 8, b"(c)\0" + b"x" * 33 + b"\0")
    t5 = limits._growth({"type": "Sequence", "normalizers": [charsmap_, replace]}) * limits._growth(metaspace)
    assert t5 == 9
    assert limits._growth({"type": "Sequence", "normalizers": [charsmap_, charsmap_]}) == 33


def test_a_message_with_text_of_a_file_is_one_short_printable_line() -> None:
    message = str(TokenizerError("unknown token " + "\x1b[31m\n" + "x" * 5000))
    assert message.isprintable()
    assert len(message) <= 1001
    assert message.startswith("unknown token [31m xxx")
