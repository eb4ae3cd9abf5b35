"""Functions that read untrusted input, with valid inputs to mutate; for test_boundaries.py and benchmarks/fuzz.py.

Property under test: mutated input gives a correct value, or is rejected with one sentence.
"""

import gzip
import json
import lzma
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from alignment import AlignmentError, TokenizerError, Vocabulary
from teachers.client.dialects.echo_completions import EchoFormat, EchoReader
from teachers.client.dialects.echo_completions import read_completion as read_echo
from teachers.client.dialects.native import parse_card
from teachers.client.dialects.sglang_generate import read_results
from teachers.client.dialects.token_strings import TokenStrings
from teachers.client.dialects.vllm_completions import read_completion
from teachers.model_checks import check_model_files
from teachers.protocol.errors import TeacherError
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import StreamWriter, read_stream
from teachers.server.admission import Rejection, check_request
from teachers.server.bodies import decode_request
from teachers.server.limits import Limits
from tests.fake_echo import GENERATED, EchoBehaviour, FakeEchoServer
from tests.fake_sglang import result
from tests.fake_vllm import choice, completion, prompt_logprobs
from tests.mutations import mutate_bytes, mutate_json_bytes
from tests.rows import random_rows
from tests.serve import FormulaEngine
from tests.templates import CHATML, LLAMA3
from tests.tiny import TEXT, Kind, save_tiny_model, tiny_vocabulary, tokenizer_config, tokenizer_json
from tests.trainer.made_runs import write_run
from trainer.chats.jinja_template import JinjaTemplate
from trainer.chats.json_values import InvalidChat
from trainer.chats.messages import normalize_chat
from trainer.errors import DataError, UserError
from trainer.evaluation.config import EvalConfig
from trainer.manifest import MANIFEST, digest_file, write_manifest
from trainer.plain_text import one_line
from trainer.report.page import make_report
from trainer.run_file import load_config
from trainer.sources.config import DataConfig
from trainer.sources.corpus import load_corpus
from trainer.training.checkpoint_folder import STATE_FILE, CheckpointMetadata, newest_intact, write_state

PROJECT_ERRORS = (Rejection, TeacherError, UserError, TokenizerError, AlignmentError)
MAX_MESSAGE_CHARS = 2000
VOCAB_SIZE = 420
SEPARATOR = b"\x00\x00"  # between the two files of a tokenizer
REQUEST = ScoreRequest(sequences=[[5, 6, 7, 8, 9], [1, 2, 3]], starts=[1, 2], top_k=4)
CARD = TeacherCard(
    model="org/model", fingerprint="f" * 64, engine="formula", dtype="float32", vocab_size=VOCAB_SIZE,
    tokenizer_sha256="0" * 64, bos_id=None, eos_id=2, expects_bos=False, max_tokens=512, max_top_k=64,
)  # fmt: skip


@dataclass(frozen=True)
class Boundary:
    """A function that reads untrusted input.

    seeds   valid inputs
    mutate  returns a changed copy of a seed
    read    reads an input. Raises a project error if it rejects it, and AssertionError if it accepts a wrong value
    """

    name: str
    seeds: tuple[bytes, ...]
    mutate: Callable[[Random, bytes], bytes]
    read: Callable[[bytes], None]


@dataclass
class Tally:
    """Outcomes of one boundary.

    outcomes   number of inputs by "accepted" or by the class of the error
    slowest_s  longest time of one input
    faults     one input for each kind of fault
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    faults: dict[str, bytes] = field(default_factory=dict)


def fuzz(boundary: Boundary, random: Random, *, inputs: int, seconds: float) -> Tally:
    """Read mutated inputs until the number of inputs or the time is reached."""
    tally, end = Tally(), time.monotonic() + seconds
    while sum(tally.outcomes.values()) < inputs and time.monotonic() < end:
        data = boundary.mutate(random, random.choice(boundary.seeds))
        began = time.monotonic()
        outcome, fault = attempt(boundary, data)
        tally.outcomes[outcome] += 1
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
        if fault:
            tally.faults.setdefault(fault, data)
    return tally


def attempt(boundary: Boundary, data: bytes) -> tuple[str, str | None]:
    """Return the outcome of one input, and a description if it is a fault."""
    try:
        boundary.read(data)
    except PROJECT_ERRORS as error:
        # The command line cleans errors of files when it prints them; text of a teacher is clean from the start.
        sentence = one_line(str(error)) if isinstance(error, UserError) else " ".join(str(error).split())
        fault = None
        if not sentence or len(sentence) > MAX_MESSAGE_CHARS:
            fault = f"{type(error).__name__}: a message of {'no' if not sentence else 'too many'} characters"
        elif not sentence.isprintable():
            fault = f"{type(error).__name__}: control characters in the message"
        return type(error).__name__, fault
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also panics of Rust libraries
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    return "accepted", None


def boundaries(folder: Path) -> Iterator[Boundary]:
    """Yield all boundaries. `folder` is empty and receives the files that are read."""
    yield Boundary("rows", (_stream(),), mutate_bytes, _read_rows)
    yield Boundary("card", (CARD.model_dump_json().encode(),), mutate_json_bytes, _read_card)
    yield Boundary("completion", (_completion(),), mutate_json_bytes, _read_completion)
    yield Boundary("SGLang results", _sglang_results(), mutate_json_bytes, _read_sglang)
    yield _echo_completion(folder)
    yield Boundary("request", (REQUEST.model_dump_json().encode(),), mutate_json_bytes, _read_request)
    for kind in ("byte_level", "sentencepiece"):
        yield _tokenizer(kind)
    yield _run_file(folder)
    yield _metrics(folder)
    yield from _data(folder)
    yield Boundary("template", (CHATML.encode(), LLAMA3.encode()), mutate_bytes, _render)
    yield _files("model folder", save_tiny_model(folder / "model"), ("config.json", "model.safetensors"), _read_model)
    checkpoints = _save_checkpoint(folder / "checkpoints")
    yield _files(
        "checkpoint", checkpoints, CHECKPOINT_FILES, partial(_read_checkpoint, (checkpoints / SHARD).read_bytes())
    )


def _stream() -> bytes:
    writer = StreamWriter(REQUEST, CARD.fingerprint)
    return b"".join(writer.write(index, rows) for index, rows in enumerate(_rows())) + writer.close()


def _rows() -> list[Rows]:
    return [_rows_from(sequence, start) for sequence, start in zip(REQUEST.sequences, REQUEST.starts, strict=True)]


def _rows_from(sequence: list[int], start: int) -> Rows:
    return random_rows(np.array(sequence), VOCAB_SIZE, REQUEST.top_k, seed=1, start=start)


def _read_rows(data: bytes) -> None:
    _check_rows(read_stream(data, REQUEST, CARD))


def _check_rows(received: list[Rows]) -> None:
    assert len(received) == len(REQUEST.sequences)
    for rows, sequence, start in zip(received, REQUEST.sequences, REQUEST.starts, strict=True):
        assert rows.ids.shape == rows.logprobs.shape == (len(sequence) - start, REQUEST.top_k)
        assert int(rows.ids.max()) < VOCAB_SIZE
        assert np.isfinite(rows.logprobs).all()
        assert np.isfinite(rows.actual).all()
        mass = np.exp(rows.logprobs.astype(np.float64)).sum(axis=1) + rows.tail
        np.testing.assert_allclose(mass, 1, atol=1e-2)


def _read_card(data: bytes) -> None:
    card = parse_card(data)
    assert 0 < card.vocab_size <= 2**24
    assert min(card.max_tokens, card.max_top_k) > 0
    for text in (card.model, card.engine, card.dtype):
        assert text.isprintable()
        assert len(text) < 1000


def _completion() -> bytes:
    choices = [
        choice(index, sequence, prompt_logprobs(sequence, _rows_from(sequence, 1), VOCAB_SIZE))
        for index, sequence in enumerate(REQUEST.sequences)
    ]
    return json.dumps(completion(choices)).encode()


def _read_completion(data: bytes) -> None:
    _check_rows(read_completion(data, REQUEST, CARD))


def _sglang_results() -> tuple[bytes, ...]:
    """Return responses with arrays and with lists of candidates."""
    requests = list(zip(REQUEST.sequences, REQUEST.starts, strict=True))
    return tuple(
        json.dumps(
            [result(s, _rows_from(s, 1), (i - 1, REQUEST.top_k), flat, VOCAB_SIZE) for s, i in requests]
        ).encode()
        for flat in (True, False)
    )


def _read_sglang(data: bytes) -> None:
    _check_rows(read_results(data, REQUEST, CARD))


def _echo_completion(folder: Path) -> Boundary:
    model = save_tiny_model(folder / "echo")
    server = FakeEchoServer(FormulaEngine(model), EchoBehaviour("escaped", shifts=False))
    sequence = server.tokenizer.encode("The harbour office", add_special_tokens=False).ids
    request = ScoreRequest(sequences=[sequence], starts=[1], top_k=4)
    card = server.engine.card
    rows = random_rows(np.array([*sequence, GENERATED]), card.vocab_size, 4, seed=1, start=1)
    reader = EchoReader(EchoFormat(False, False, False), TokenStrings(server.tokens, ["escaped"]), card.bos_id)

    def read(data: bytes) -> None:
        received = reader.rows(read_echo(data)[0], request, card)
        known = ~np.isnan(received.actual)
        assert len(received) == len(sequence) - 1
        assert (received.ids[known] < card.vocab_size).all()
        mass = np.exp(received.logprobs[known].astype(np.float64)).sum(axis=1) + received.tail[known]
        np.testing.assert_allclose(mass, 1, atol=1e-2)

    seed = json.dumps(server.response(sequence, rows, "The harbour office")).encode()
    return Boundary("echo completion", (seed,), mutate_json_bytes, read)


def _tokenizer(kind: Kind) -> Boundary:
    def read(data: bytes) -> None:
        spec, _, config = data.partition(SEPARATOR)
        vocabulary = Vocabulary.parse(spec, config, name="fuzz")
        assert 0 < len(vocabulary) <= 2**24
        tokens = vocabulary.encode("The harbour office opened at six.\n")
        assert all(0 <= token < len(vocabulary) for token in tokens.ids.tolist())

    def mutate(random: Random, data: bytes) -> bytes:
        parts = data.split(SEPARATOR)
        index = 0 if random.random() < 0.8 else 1
        parts[index] = mutate_json_bytes(random, parts[index])
        return SEPARATOR.join(parts)

    seed = tokenizer_json(kind).encode() + SEPARATOR + json.dumps(tokenizer_config(kind)).encode()
    return Boundary(f"tokenizer {kind}", (seed,), mutate, read)


def _run_file(folder: Path) -> Boundary:
    path = folder / "run.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_config(path)

    recipes = Path(__file__).parent.parent / "recipes"
    seeds = tuple((recipes / name).read_bytes() for name in ("demo.toml", "ray.toml"))
    return Boundary("run file", seeds, mutate_bytes, read)


def _metrics(folder: Path) -> Boundary:
    run = write_run(folder / "run", 20, teachers=("a", "b"), changes={5: ("teacher_lost", "a", "no response")})

    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.3:
            return mutate_bytes(random, data)
        lines = data.splitlines(keepends=True)
        index = random.randrange(len(lines))
        lines[index] = mutate_json_bytes(random, lines[index]) + b"\n"
        return b"".join(lines)

    def read(data: bytes) -> None:
        (run / "metrics.jsonl").write_bytes(data)
        make_report(run)

    return Boundary("metrics", ((run / "metrics.jsonl").read_bytes(),), mutate, read)


def _data(folder: Path) -> Iterator[Boundary]:
    texts = [line for line in TEXT.splitlines() if line]
    table = pa.table({"text": texts})
    pq.write_table(table, folder / "seed.parquet")
    chats = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]} for text in texts]
    rows = [{"text": text, "kind": "a"} for text in texts]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    delimited = "\n".join(["kind,text", *('a,"' + text.replace('"', '""') + '"' for text in texts)]).encode()
    arrow = pa.BufferOutputStream()
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    vocabulary = tiny_vocabulary("byte_level")

    def read(name: str, data: bytes, **columns: str) -> None:
        (folder / name).write_bytes(data)
        source = {"files": [str(folder / name)], **columns}
        config = DataConfig.model_validate({"sources": [source], "window_tokens": 40, "max_invalid": 3})
        corpus = load_corpus(config, EvalConfig(held_out_documents=0), vocabulary, 0)
        for sample in corpus.train:
            sample.text.encode()

    yield Boundary("text lines", (lines,), mutate_bytes, partial(read, "data.jsonl"))
    chat_lines = "".join(json.dumps(chat) + "\n" for chat in chats).encode()
    yield Boundary("chat lines", (chat_lines,), mutate_bytes, partial(read, "chats.jsonl", messages_column="messages"))
    yield Boundary("chats", (_chat(),), mutate_json_bytes, _read_chat)
    yield Boundary("text", (TEXT.encode(),), mutate_bytes, partial(read, "data.txt"))
    yield Boundary("json array", (json.dumps(rows).encode(),), mutate_bytes, partial(read, "data.json"))
    yield Boundary("csv", (delimited,), mutate_bytes, partial(read, "data.csv"))
    gz, xz = _mutate_inside(gzip.compress, gzip.decompress), _mutate_inside(lzma.compress, lzma.decompress)
    yield Boundary("compressed lines", (gzip.compress(lines),), gz, partial(read, "data.jsonl.gz"))
    yield Boundary("compressed text", (lzma.compress(TEXT.encode()),), xz, partial(read, "data.txt.xz"))
    yield Boundary("arrow", (arrow.getvalue().to_pybytes(),), mutate_bytes, partial(read, "data.arrow"))
    yield Boundary("parquet", ((folder / "seed.parquet").read_bytes(),), mutate_bytes, partial(read, "data.parquet"))


def _mutate_inside(
    compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]
) -> Callable[[Random, bytes], bytes]:
    """Return a function that changes a compressed file, or its content."""

    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.5:
            return mutate_bytes(random, data)
        return compress(mutate_bytes(random, decompress(data)))

    return mutate


def _chat() -> bytes:
    call = {"type": "function", "function": {"name": "weigh", "arguments": {"sack": 3, "unit": None}}}
    parts = [{"type": "text", "text": "How heavy?"}, {"type": "thinking", "thinking": "heavy"}]
    messages = [
        {"role": "user", "content": parts, "weight": 0},
        {"from": "gpt", "value": None, "tool_calls": [call], "reasoning": "why", "train": True},
        {"role": "tool", "content": {"kg": 3}},
    ]
    return json.dumps([messages, [{"name": "weigh", "parameters": {}}], [0, 1, 0]]).encode()


def _read_chat(data: bytes) -> None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError("not JSON") from error
    if not isinstance(values, list) or len(values) != 3:
        raise DataError("no chat")
    try:
        messages, tools = normalize_chat(*values)
    except InvalidChat as error:
        raise DataError(str(error)) from error
    for message in messages:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
        assert isinstance(message.get("reasoning_content", ""), str)
        assert all(isinstance(call["function"]["arguments"], dict) for call in message.get("tool_calls", ()))
    assert normalize_chat(messages, tools) == (messages, tools)  # the form is a fixed point


def _read_request(data: bytes) -> None:
    request = decode_request(data, Limits())
    check_request(request, CARD, Limits())
    assert all(0 <= token < VOCAB_SIZE for sequence in request.sequences for token in sequence)


def _render(data: bytes) -> None:
    template = JinjaTemplate.from_files({"chat_template.jinja": data}, "fuzz", None, date(2026, 1, 1))
    text = template.render([{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Fifty."}], ())
    assert len(text) < 2 << 20


def _files(name: str, folder: Path, files: tuple[str, ...], read_folder: Callable[[Path], None]) -> Boundary:
    """Return a boundary that changes one of the files of a folder."""
    intact = {file: (folder / file).read_bytes() for file in files}

    def read(data: bytes) -> None:
        number, _, content = data.partition(SEPARATOR)
        changed = files[int(number)]
        for file in files:
            (folder / file).write_bytes(content if file == changed else intact[file])
        read_folder(folder)

    def mutate(random: Random, data: bytes) -> bytes:
        number, _, content = data.partition(SEPARATOR)
        return number + SEPARATOR + mutate_bytes(random, content)

    seeds = tuple(str(number).encode() + SEPARATOR + intact[file] for number, file in enumerate(files))
    return Boundary(name, seeds, mutate, read)


def _read_model(folder: Path) -> None:
    check_model_files(folder)


SHARD = "step-00000004/shard-00000.safetensors"
CHECKPOINT_FILES = (SHARD, f"step-00000004/{STATE_FILE}", f"step-00000004/{MANIFEST}")


def _save_checkpoint(folder: Path) -> Path:
    shard = folder / SHARD
    shard.parent.mkdir(parents=True)
    save_file({"weight": np.arange(64, dtype=np.float32)}, shard)
    write_state(shard.parent, CheckpointMetadata(4, {"seed": 1}, "fp32"))
    write_manifest(shard.parent, {path.name: digest_file(path) for path in shard.parent.iterdir()})
    return folder


def _read_checkpoint(shard: bytes, folder: Path) -> None:
    checkpoint = newest_intact(folder)
    assert checkpoint is not None
    assert checkpoint.metadata == CheckpointMetadata(4, {"seed": 1}, "fp32")
    assert (folder / SHARD).read_bytes() == shard
