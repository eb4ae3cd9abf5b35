"""The examples of CONTRIBUTING.md work: each is one file and one registry line, and is then used like the others."""

import asyncio
import csv
import gzip
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from alignment import Vocabulary
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.detect import connect_replica, detect_dialect
from teachers.engines import ENGINES, engine_options
from teachers.protocol.messages import ScoreRequest
from teachers.server.app import build_app
from teachers.server.limits import Limits
from teachers.server.service import Service
from tests.serve import FormulaEngine, serving, serving_app
from tests.tiny import TEXT, tiny_vocabulary
from tests.trainer.runs import losses, run_config, write_corpus
from trainer.cli.run_checks import examine
from trainer.component_reference import COMPONENT_KINDS, component_reference
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.preview import preview
from trainer.fusion import FUSION_METHODS
from trainer.losses import DIVERGENCES
from trainer.losses.divergences import divergence
from trainer.sources.config import DataConfig, SourceConfig
from trainer.sources.corpus import load_corpus
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train
from trainer.training.start_checks import check_data

ROOT = Path(__file__).parents[1]
PACKAGE = "contributed"  # parent package of the written files
BLOCK = re.compile(r"^```python\n# (.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REGISTRY_LINE = re.compile(r'(?P<path>\S+)/__init__\.py: (?P<name>[A-Z_]+)(?:, before "(?P<before>\w+)")?')


class RegistryLine(NamedTuple):
    """One registry line: the registry as "module:NAME", the entry before which it is inserted, its name and target."""

    registry: str
    before: str | None
    name: str
    target: str


def example_files() -> dict[str, str]:
    """Return the files of the examples by path."""
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    return {head: body for head, body in blocks if not REGISTRY_LINE.fullmatch(head)}


def registry_lines() -> dict[str, RegistryLine]:
    """Return the registry lines of the examples by registry name."""
    lines = {}
    for head, body in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        if match := REGISTRY_LINE.fullmatch(head):
            ((name, target),) = json.loads("{" + body.strip().rstrip(",") + "}").items()
            registry = f"{match['path'].replace('/', '.')}:{match['name']}"
            lines[match["name"]] = RegistryLine(registry, match["before"], name, target)
    return lines


@contextmanager
def registered(line: RegistryLine) -> Iterator[None]:
    """Register the written file under its name within the block."""
    registry: dict[str, str] = resolve_name(line.registry)
    entries = list(registry.items())
    position = [*registry].index(line.before) if line.before else len(entries)
    registry.clear()
    registry.update([*entries[:position], (line.name, f"{PACKAGE}.{line.target}"), *entries[position:]])
    try:
        yield
    finally:
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="module", autouse=True)
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write the files of the examples to a package that can be imported. Yields its folder."""
    folder = tmp_path_factory.mktemp("contributing")
    for path, source in example_files().items():
        file = folder / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def examples(written: Path) -> Iterator[None]:
    """Register all examples for one test."""
    with ExitStack() as stack:
        for line in registry_lines().values():
            stack.enter_context(registered(line))
        yield


@pytest.fixture(scope="module")
def urls(tiny_byte_level: Path, written: Path) -> Iterator[list[str]]:
    """Addresses of two teachers: random distributions, and those of the example of an engine."""
    options = resolve_name(f"{PACKAGE}.{registry_lines()['ENGINES'].target}")()
    uniform = asyncio.run(options.open(tiny_byte_level))
    with serving(FormulaEngine(tiny_byte_level)) as one, serving(uniform) as two:
        yield [one, two]


def trained_losses(config: RunConfig) -> list[float]:
    """Train two steps and return their losses."""
    train(config)
    return list(losses(Path(config.output.dir)).values())


TWO_STEPS: dict[str, Any] = {"train": {"steps": 2, "batch_samples": 2}, "eval": {"held_out_documents": 1}}


def test_every_kind_of_component_has_one_example() -> None:
    assert [line.registry for line in registry_lines().values()] == [kind.registry for kind in COMPONENT_KINDS]
    paths = [line.target.partition(":")[0].replace(".", "/") + ".py" for line in registry_lines().values()]
    assert [*example_files()] == paths


def test_the_examples_pass_the_linter(written: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, str(written)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_registered_components_appear_in_the_generated_page() -> None:
    page = component_reference()
    for line in registry_lines().values():
        assert f"| `{line.name}` | " in page
        assert f"`{PACKAGE}.{line.target.partition(':')[0]}` |" in page


@pytest.mark.parametrize(
    ("section", "key", "registry"),
    [("loss", "divergence", "DIVERGENCES"), ("fusion", "method", "FUSION_METHODS"), ("teachers", "signal", "SIGNALS")],
)
def test_the_choices_of_the_config_contain_the_component(tmp_path: Path, section: str, key: str, registry: str) -> None:
    def config_with(value: str) -> RunConfig:
        raw = run_config(tmp_path, tmp_path / "c.jsonl", tmp_path / "out", ["http://h"]).model_dump()
        (raw[section][0] if section == "teachers" else raw[section])[key] = value
        return RunConfig.model_validate(raw)

    name = registry_lines()[registry].name
    dumped = config_with(name).model_dump()[section]
    assert (dumped[0] if section == "teachers" else dumped)[key] == name
    with pytest.raises(ValueError, match=rf"expected one of .*{name}"):
        config_with("unknown")


def test_the_divergence_is_a_distance_between_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    hellinger = divergence(registry_lines()["DIVERGENCES"].name)
    np.testing.assert_allclose(hellinger(p, p.log()), 0, atol=1e-12)
    np.testing.assert_allclose(hellinger(p, q.log()), 1 - (p * q).sqrt().sum(-1), rtol=1e-9)


def test_the_divergence_trains_the_student(tmp_path: Path, tiny_byte_level: Path, urls: list[str]) -> None:
    corpus = write_corpus(tmp_path)
    received = {
        name: trained_losses(
            run_config(tiny_byte_level, corpus, tmp_path / name, urls, loss={"divergence": name}, **TWO_STEPS)
        )
        for name in ("forward_kl", registry_lines()["DIVERGENCES"].name)
    }
    ours, theirs = received.values()
    assert ours != theirs
    assert all(map(math.isfinite, [*ours, *theirs]))


def test_the_fusion_method_is_previewed_and_ignores_the_weights(
    tmp_path: Path, tiny_byte_level: Path, urls: list[str]
) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls)
    first, second = config.teachers
    unequal = config.model_copy(update={"teachers": [first.model_copy(update={"weight": 5.0}), second]})
    equal, weighted = preview(config).fused_bpb, preview(unequal).fused_bpb
    assert equal["uniform"] == weighted["uniform"] == equal["mean"]
    assert weighted["mean"] != equal["mean"]


def test_the_signal_trains_the_student_and_is_fused(tmp_path: Path, tiny_byte_level: Path, urls: list[str]) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, **TWO_STEPS)
    teachers = [teacher.model_copy(update={"signal": "top1"}) for teacher in config.teachers]
    assert all(map(math.isfinite, trained_losses(config.model_copy(update={"teachers": teachers}))))
    steps = [event for event in read_metrics(tmp_path / "out" / "metrics.jsonl") if event["event"] == "step"]
    assert [step["coverage"] for step in steps] == [1.0, 1.0]
    start = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert [teacher["signal"] for teacher in start["run"]["teachers"]] == ["top1", "top1"]


def test_a_signal_that_supports_chats_is_accepted_for_chats(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"question": "How many?", "answer": TEXT}) + "\n", encoding="utf-8")
    vocabulary = tiny_vocabulary("byte_level")
    for signal, accepted in (("top1", True), ("uld", False)):
        raw = run_config(tmp_path, chats, tmp_path / "o", ["http://h"], eval={"held_out_documents": 0}).model_dump()
        raw["teachers"][0]["signal"] = signal
        config = RunConfig.model_validate(raw)
        if accepted:
            assert check_data(config, vocabulary)[0].has_chats
        else:
            with pytest.raises(
                ConfigError, match="t0 has signal 'uld', which is for texts; source chats.jsonl has chat"
            ):
                check_data(config, vocabulary)


def test_the_dialect_of_a_server_behind_a_proxy_is_detected(tmp_path: Path, tiny_byte_level: Path) -> None:
    engine, proxy = FormulaEngine(tiny_byte_level), FastAPI()
    proxy.mount("/teacher", build_app(Service(engine, Limits())))
    request = ScoreRequest(sequences=[[0, 5, 6, 7]], starts=[1], top_k=8)

    async def query(url: str) -> tuple[str, int]:
        address = ReplicaAddress("t", url)
        dialect, client = await detect_dialect(address), await connect_replica(address)
        try:
            (rows,) = await client.score(request, await client.card(), 10.0)
        finally:
            await client.aclose()
        return type(dialect).__name__, len(rows)

    with serving_app(proxy) as url, serving(FormulaEngine(tiny_byte_level)) as native:
        assert asyncio.run(query(url)) == ("ProxiedDialect", 3)
        assert asyncio.run(query(native)) == ("NativeDialect", 3)
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url], **TWO_STEPS)
        assert all(map(math.isfinite, trained_losses(config)))


def test_the_engine_is_served_and_checked_by_doctor(tmp_path: Path, tiny_byte_level: Path) -> None:
    options = engine_options("uniform", {"max_top_k": 32})
    engine = asyncio.run(options.open(tiny_byte_level))
    with serving(engine) as url:
        findings = examine(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url]))
    details = [finding.detail for finding in findings if finding.subject == "teacher t0"]
    assert all(finding.ok for finding in findings), findings
    assert f"{tiny_byte_level.name} on uniform, dtype float32, up to K = 32" in details
    nats = math.log(len(tiny_vocabulary("byte_level")))
    assert f"probe sentence {nats:.2f} nats per token without BOS" in details
    with pytest.raises(Exception, match=f"expected one of {', '.join(ENGINES)}, received 'unknown'"):
        engine_options("unknown", {})


def test_the_tokenizer_kind_yields_a_vocabulary() -> None:
    words = ["[UNK]", *sorted(set(TEXT))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    vocabulary = Vocabulary.parse(tokenizer.to_str().encode(), name="characters")
    assert vocabulary.kind.name == "character"
    assert vocabulary.token_bytes == (None, *(word.encode() for word in words[1:]))
    tokens = vocabulary.encode("six bells")
    assert [words[i] for i in tokens.ids] == list("six bells")
    assert tokens.ends.tolist() == list(range(1, 10))


def test_the_source_reads_paragraphs_of_compressed_files_too(tmp_path: Path) -> None:
    for name, compress in (("corpus.par", bytes), ("corpus.par.gz", gzip.compress)):
        (tmp_path / name).write_bytes(compress(b"six sacks,\none wet\n\n\n\ntwo bells\n"))
        config = DataConfig(sources=[SourceConfig(files=[str(tmp_path / name)])])
        corpus = load_corpus(config, EvalConfig(), tiny_vocabulary("byte_level"), seed=0)
        assert [(sample.text, sample.name) for sample in corpus.train] == [
            ("six sacks,\none wet", f"{name}:1#0"),
            ("two bells", f"{name}:3#0"),
        ]
        assert corpus.sources[0].empty == 1


def test_the_record_format_is_detected_by_its_columns(tmp_path: Path) -> None:
    row = {"prompt": "How many?", "chosen": "Six.", "rejected": "Five."}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    config = DataConfig(sources=[SourceConfig(files=[str(tmp_path / "p.jsonl")])])
    corpus = load_corpus(config, EvalConfig(), tiny_vocabulary("byte_level"), seed=0)
    assert corpus.sources[0].format == "chats: columns prompt, chosen, rejected"
    assert [message["content"] for message in corpus.train[0].messages] == ["How many?", "Six."]


def test_the_tracker_receives_the_events_of_a_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    sections: dict[str, Any] = TWO_STEPS | {"tracking": {"csv": True}, "loss": {"ce_weight": 1.0}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections)
    expected = dict(enumerate(trained_losses(config), 1))
    with (tmp_path / "out" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {int(step): float(value) for step, _, name, value in rows if name == "loss"} == expected
    assert {name for _, _, name, _ in rows} > {"held_out_bpb", "grad_norm", "tokens_seen"}
    with pytest.raises(ValueError, match="unknown tracker 'csw'; the nearest known one is 'csv'"):
        run_config(tmp_path, tmp_path, tmp_path, [], tracking={"csw": True})


def test_registries_are_restored_after_each_test() -> None:
    assert [*FUSION_METHODS][-1] == "uniform"
    assert [*DIVERGENCES][-1] == "squared_hellinger"
    for line in registry_lines().values():
        registry: dict[str, str] = resolve_name(line.registry)
        with registered(line._replace(name="again")):
            assert "again" in registry
        assert "again" not in registry
