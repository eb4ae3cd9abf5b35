"""The choice of the type to compute in, and log-probabilities of −∞."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from teachers import model_loading
from teachers.engines.transformers import TransformersEngine
from teachers.engines.transformers_options import TransformersOptions
from teachers.model_loading import bf16_is_native, resolve_dtype
from teachers.protocol.errors import TeacherError
from teachers.protocol.rows import LEAST_LOGPROB, clip_logprobs
from teachers.protocol.wire_format import as_received

IDS = list(range(5, 25))


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_bf16_is_native_on_x86_with_avx512_bf16_or_amx(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert bf16_is_native("cpu") is (avx512 or amx)
    assert resolve_dtype("auto", "cpu") == ("bfloat16" if avx512 or amx else "float32")


def test_bf16_is_emulated_if_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not bf16_is_native("cpu")


@pytest.mark.parametrize(("bf16_s", "float32_s", "native"), [(1.0, 2.0, True), (1.0, 1.0, True), (2.0, 1.0, False)])
def test_other_cpus_are_measured(
    monkeypatch: pytest.MonkeyPatch, bf16_s: float, float32_s: float, native: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(
        model_loading, "_matmul_seconds", lambda dtype: bf16_s if dtype == torch.bfloat16 else float32_s
    )
    model_loading._bf16_matmul_is_fast.cache_clear()
    assert bf16_is_native("cpu") is native
    model_loading._bf16_matmul_is_fast.cache_clear()


def test_a_measurement_is_positive_and_short() -> None:
    assert 0 < model_loading._matmul_seconds(torch.float32) < 0.2


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_bf16_is_native_on_gpus(device: str) -> None:
    assert bf16_is_native(device)
    assert resolve_dtype("auto", device) == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_explicit_dtype_is_kept(dtype: str) -> None:
    assert resolve_dtype(dtype, "cpu") == resolve_dtype(dtype, "cuda") == dtype


def test_an_unknown_dtype_is_rejected() -> None:
    with pytest.raises(ValueError, match="expected auto, bfloat16 or float32, received 'int8'"):
        resolve_dtype("int8", "cpu")


@pytest.mark.parametrize("native", [True, False])
def test_the_card_contains_the_resolved_dtype(
    monkeypatch: pytest.MonkeyPatch, tiny_byte_level: Path, native: bool
) -> None:
    monkeypatch.setattr(model_loading, "bf16_is_native", lambda _: native)
    engine = TransformersEngine(tiny_byte_level)
    engine.close()
    assert TransformersOptions().dtype == "auto"
    assert engine.card.dtype == ("bfloat16" if native else "float32")
    assert engine._model.dtype == getattr(torch, engine.card.dtype)


def test_an_unknown_device_is_one_sentence(tiny_byte_level: Path) -> None:
    with pytest.raises(TeacherError, match="cannot load .* on nonsense"):
        TransformersEngine(tiny_byte_level, TransformersOptions(device="nonsense"))


def test_logprobs_are_clipped_to_the_range_of_the_wire() -> None:
    values = np.array([-np.inf, -1e30, LEAST_LOGPROB, -1.0, 0.0, 1e-7, np.nan], np.float32)
    expected = np.array([LEAST_LOGPROB] * 3 + [-1.0, 0.0, 0.0, np.nan], np.float32)
    np.testing.assert_array_equal(clip_logprobs(values), expected)
    assert np.float32(np.float16(LEAST_LOGPROB)) == LEAST_LOGPROB


def test_tokens_of_probability_0_arrive_as_the_least_logprob(
    monkeypatch: pytest.MonkeyPatch, tiny_byte_level: Path
) -> None:
    """The actual token, a candidate and a chosen id, each with a logit of −∞."""
    engine = TransformersEngine(tiny_byte_level, TransformersOptions(dtype="float32"))
    logits = engine._logits

    def masked(hidden_CD: torch.Tensor) -> torch.Tensor:
        logits_CW = logits(hidden_CD).clone()
        logits_CW[:, 4:] = -torch.inf  # only ids 0 … 3 remain; all actual ids are impossible
        return logits_CW

    monkeypatch.setattr(engine, "_logits", masked)
    rows = asyncio.run(engine.score_chosen(IDS, 1, 8, [[0, 9]] * (len(IDS) - 1)))
    engine.close()
    assert rows.chosen is not None
    for values in (rows.actual, rows.logprobs[:, 4:], rows.chosen[:, 1]):
        np.testing.assert_array_equal(values, np.float32(LEAST_LOGPROB))
    assert np.isfinite(rows.chosen[:, 0]).all()
    received = as_received(replace(rows, chosen=None), IDS, engine.card)
    np.testing.assert_array_equal(received.actual, np.float32(LEAST_LOGPROB))
