"""The transformers engine against a plain float32 forward pass."""

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from alignment import Vocabulary
from teachers.client.dialects.native import NativeClient
from teachers.engines.transformers import CHUNK_TOKENS, MAX_CHOSEN, TransformersEngine, batches_by_length
from teachers.engines.transformers_options import TransformersOptions
from teachers.protocol.errors import TeacherError
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows
from tests.serve import serving
from tests.tiny import TEXT, save_tiny_model, tiny_vocabulary

IDS = tiny_vocabulary("byte_level").encode(TEXT).ids.tolist()


def score(folder: Path, options: TransformersOptions, sequences: list[list[int]], top_k: int) -> list[Rows]:
    engine = TransformersEngine(folder, options)

    async def score_all() -> list[Rows]:
        return await asyncio.gather(*(engine.score(s, 1, top_k) for s in sequences))

    try:
        return asyncio.run(score_all())
    finally:
        engine.close()


def plain_logprobs(folder: Path, sequence: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs: torch.Tensor = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
    return logprobs


@pytest.mark.parametrize("batch_tokens", [0, 4096])
def test_rows_are_those_of_a_plain_float32_forward_pass(tiny_byte_level: Path, batch_tokens: int, device: str) -> None:
    sequences = [IDS[:300], IDS[:7], IDS[50:180]]
    assert len(sequences[0]) > CHUNK_TOKENS
    options = TransformersOptions(dtype="float32", batch_tokens=batch_tokens, device=device)
    rows = score(tiny_byte_level, options, sequences, 16)
    for sequence, got in zip(sequences, rows, strict=True):
        expected = plain_logprobs(tiny_byte_level, sequence)
        top = expected.topk(16)
        np.testing.assert_allclose(got.logprobs, top.values, atol=1e-4)
        np.testing.assert_allclose(got.logprobs, expected.gather(1, torch.from_numpy(got.ids.astype(int))), atol=1e-4)
        np.testing.assert_allclose(got.actual, expected[range(len(sequence) - 1), sequence[1:]], atol=1e-4)
        np.testing.assert_allclose(got.tail, 1 - top.values.double().exp().sum(1), atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [0, 4096])
def test_chosen_ids_are_scored_like_a_plain_forward_pass_in_the_order_of_the_request(
    tiny_byte_level: Path, batch_tokens: int
) -> None:
    sequence, start = IDS[:300], 3
    chosen = [[(7 * t + m) % 400 for m in (200, 3, 3)] for t in range(start, len(sequence))]
    with serving(
        TransformersEngine(tiny_byte_level, TransformersOptions(dtype="float32", batch_tokens=batch_tokens))
    ) as url:
        (got,), card = asyncio.run(score_chosen(url, sequence, start, chosen))
    expected = plain_logprobs(tiny_byte_level, sequence)[start - 1 :]
    assert card.max_chosen >= 3
    assert got.chosen is not None
    np.testing.assert_allclose(got.chosen, expected.gather(1, torch.tensor(chosen)), atol=1e-4)
    np.testing.assert_allclose(got.actual, expected[range(len(chosen)), sequence[start:]], atol=1e-4)


def test_invalid_chosen_ids_are_rejected_with_one_sentence(tiny_byte_level: Path) -> None:
    sequence, most = IDS[:300], MAX_CHOSEN
    cases: tuple[tuple[list[list[list[int]]], str], ...] = (
        ([[[1] * (most + 1)] * 297], f"from 1 to {most}, received {most + 1}"),
        ([[[1]] * 296 + [[1, 2]]], "the same number of ids at every position, .* received 1, 2"),
        ([[[]] * 297], "received 0"),
        ([[[1]] * 5], "chosen.0: expected ids for 297 scored positions, received 5"),
        ([[[1]] * 297] * 2, "chosen: expected ids for 1 sequences, received 2"),
        ([[[10**6]] * 297], "chosen contains id 1000000; the largest id of the vocabulary is"),
    )
    with serving(TransformersEngine(tiny_byte_level, TransformersOptions(dtype="float32"))) as url:
        for wrong, message in cases:
            request = {"sequences": [sequence], "starts": [3], "top_k": 4, "chosen": wrong}
            response = httpx.post(f"{url}/v1/score", json=request)
            assert response.status_code == 422
            assert re.search(message, response.json()["detail"])


async def score_chosen(
    url: str, sequence: list[int], start: int, chosen: list[list[int]]
) -> tuple[list[Rows], TeacherCard]:
    client = NativeClient("t", url)
    try:
        card = await client.card()
        request = ScoreRequest(sequences=[sequence], starts=[start], top_k=4, chosen=[chosen])
        return await client.score(request, card, 30.0), card
    finally:
        await client.aclose()


def test_a_real_model_in_bfloat16_stays_near_float32(smollm2: Path) -> None:
    sequence = list(range(500, 560))
    (got,) = score(smollm2, TransformersOptions(), [sequence], 8)
    expected = plain_logprobs(smollm2, sequence)[range(59), sequence[1:]]
    assert abs(float(got.actual.mean() - expected.mean())) < 0.05


def test_scores_do_not_depend_on_concurrent_sequences(tiny_byte_level: Path) -> None:
    options = TransformersOptions(dtype="float32", batch_tokens=0)
    (alone,) = score(tiny_byte_level, options, [IDS[:100]], 8)
    among = score(tiny_byte_level, options, [IDS[:37], IDS[:100], IDS[:211]], 8)[1]
    np.testing.assert_array_equal(alone.logprobs, among.logprobs)


def test_bos_is_expected_if_the_model_predicts_better_with_it(gemma: Path, smollm2: Path) -> None:
    for folder, expected in ((gemma, True), (smollm2, False)):
        engine = TransformersEngine(folder)
        engine.close()
        assert engine.card.expects_bos is expected


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_expected_if_transformers_puts_it_in_front(
    tmp_path: Path, tiny_sentencepiece: Path, adds_bos: bool, flag: bool
) -> None:
    """Beside a tokenizer.json, transformers ignores add_bos_token. A flag that contradicts it is probed or ignored."""
    folder = shutil.copytree(tiny_sentencepiece, tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": flag}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not adds_bos:
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert Vocabulary.load(folder).expects_bos is adds_bos
    if adds_bos or not flag:
        engine = TransformersEngine(folder)
        engine.close()
        assert engine.card.expects_bos is adds_bos


def test_closing_cancels_jobs_that_arrived_during_the_last_batch(tiny_byte_level: Path) -> None:
    begun = threading.Event()

    class Slow(TransformersEngine):
        def _run_batch(self, batch: list[Any]) -> None:
            begun.set()
            assert self._closing.wait(20)
            super()._run_batch(batch)

    engine = Slow(tiny_byte_level, TransformersOptions(dtype="float32"))

    async def score_all() -> list[object]:
        first = asyncio.create_task(engine.score(IDS[:9], 1, 4))
        assert await asyncio.to_thread(begun.wait, 20)
        more = [asyncio.create_task(engine.score(IDS[:9], 1, 4)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(engine.close)
        more.append(asyncio.create_task(engine.score(IDS[:9], 1, 4)))
        return await asyncio.wait_for(asyncio.gather(first, *more, return_exceptions=True), 5)

    responses = asyncio.run(score_all())
    assert isinstance(responses[0], Rows)
    assert all(isinstance(response, asyncio.CancelledError) for response in responses[1:])


def test_closing_cancels_waiting_jobs_and_does_not_hang(tiny_byte_level: Path) -> None:
    engine = TransformersEngine(tiny_byte_level, TransformersOptions(dtype="float32"))

    async def score_all() -> list[object]:
        jobs = [asyncio.create_task(engine.score(IDS[:300], 1, 16)) for _ in range(200)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await asyncio.to_thread(engine.close)
        assert time.monotonic() - began < 5
        return await asyncio.gather(*jobs, return_exceptions=True)

    responses = asyncio.run(score_all())
    assert any(isinstance(a, asyncio.CancelledError) for a in responses)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "cannot load"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot load"),
        (lambda f: (f / "config.json").write_text("{"), "cannot load"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "cannot load"),
    ],
)
def test_a_damaged_model_is_one_sentence(
    tmp_path: Path, tiny_byte_level: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(tiny_byte_level, tmp_path / "m")
    damage(folder)
    with pytest.raises(TeacherError, match=message):
        TransformersEngine(folder)


def test_an_unavailable_device_is_one_sentence(tiny_byte_level: Path) -> None:
    for device in ("cuda:7", "nonsense"):
        with pytest.raises(TeacherError, match=f"on {device}"):
            TransformersEngine(tiny_byte_level, TransformersOptions(device=device))


def test_the_fingerprint_changes_with_weights_and_dtype(tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    cards = []
    for folder, dtype in ((tiny_byte_level, "float32"), (tiny_byte_level, "bfloat16"), (tiny_sentencepiece, "float32")):
        engine = TransformersEngine(folder, TransformersOptions(dtype=dtype))  # type: ignore[arg-type]
        engine.close()
        cards.append(engine.card)
    assert len({card.fingerprint for card in cards}) == 3
    assert cards[0].tokenizer_sha256 == tiny_vocabulary("byte_level").fingerprint
    assert cards[0].max_tokens == 512


def test_a_failing_request_does_not_stop_the_engine(tiny_byte_level: Path) -> None:
    engine = TransformersEngine(tiny_byte_level, TransformersOptions(dtype="float32"))

    async def score_all() -> Rows:
        with pytest.raises(IndexError):
            await engine.score([10**6, 1], 1, 4)
        return await engine.score(IDS[:5], 1, 4)

    assert len(asyncio.run(score_all())) == 4
    engine.close()


def test_batches_have_similar_lengths_and_at_most_the_allowed_tokens() -> None:
    class Job:
        def __init__(self, length: int) -> None:
            self.sequence = [0] * length

    jobs = [Job(n) for n in (5, 100, 6, 90, 7)]
    lengths = [[len(j.sequence) for j in batch] for batch in batches_by_length(jobs, 30)]  # type: ignore[arg-type]
    assert lengths == [[5, 6, 7], [90], [100]]


def test_attention_applies_the_soft_cap(tmp_path: Path) -> None:
    """Gemma 2 has a soft cap, which the default attention of transformers ignores."""
    folder = save_tiny_model(tmp_path / "m")
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(
        **sizes,
        num_key_value_heads=1,
        vocab_size=len(tiny_vocabulary("byte_level")),
        head_dim=16,
        attn_logit_softcapping=1.0,
    )
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # large enough that the cap has an effect
    model.save_pretrained(folder)
    capped: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    (rows,) = score(folder, TransformersOptions(dtype="float32"), [IDS[:60]], 4)
    with torch.no_grad():
        expected = capped(torch.tensor([IDS[:60]])).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(rows.actual, expected.gather(1, torch.tensor(IDS[1:60])[:, None])[:, 0], atol=1e-4)


def test_a_model_with_missing_weights_is_rejected(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", tied=False)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeacherError, match=r"its files lack 1 of the model's weights, for example model\.norm\.weight"):
        TransformersEngine(folder)


def test_longrope_models_are_scored_without_batching(tmp_path: Path) -> None:
    """longrope chooses its factors by the longest position of a batch."""
    folder = save_tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    config["rope_parameters"] |= {"rope_type": "longrope", "factor": 8.0} | factors
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = TransformersOptions(dtype="float32", batch_tokens=4096)
    (alone,) = score(folder, options, [IDS[:33]], 8)
    beside = score(folder, options, [IDS[:33], IDS[:296]], 8)[0]
    np.testing.assert_array_equal(alone.actual, beside.actual)


def test_a_directory_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"it has no file config\.json"):
        TransformersEngine(tmp_path)
