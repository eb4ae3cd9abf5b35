"""Packing of samples into rows: coverage, row lengths, and equal losses with and without packing."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignment import Vocabulary
from alignment.offsets import Tokens
from trainer.losses.head import Loss, head_loss
from trainer.losses.labels import labels_from
from trainer.losses.objective import Objective
from trainer.student.checks import packing_is_isolated
from trainer.student.model import Student, StudentModule
from trainer.student.packing import first_fit_decreasing, pack

LENGTHS = (31, 4, 17, 9, 2, 12, 31, 6)
SIZES: Any = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}

NO_DROPOUT: Any = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = first_fit_decreasing(lengths, max(lengths))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= max(lengths) for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // max(lengths))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.booleans())
def test_states_belong_to_the_selected_tokens(lengths: list[int], share_rows: bool) -> None:
    sequences = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    masks = [np.arange(n) % 3 != 1 for n in lengths]
    packed = pack(sequences, masks, share_rows=share_rows)
    expected = np.concatenate([s[mask] for s, mask in zip(sequences, masks, strict=True)])
    np.testing.assert_array_equal(packed.ids_BL.ravel()[packed.states_T], expected)
    positions = np.concatenate([np.arange(n)[mask] for n, mask in zip(lengths, masks, strict=True)])
    np.testing.assert_array_equal(packed.positions_BL.ravel()[packed.states_T], positions)


def test_without_samples_there_is_one_row_of_one_unused_token() -> None:
    packed = pack([], [])
    assert packed.ids_BL.shape == (1, 1)
    assert len(packed.states_T) == 0


@pytest.fixture
def vocabulary(tiny_sentencepiece: Path) -> Vocabulary:
    vocabulary = Vocabulary.load(tiny_sentencepiece)
    assert len(vocabulary.prefix) == 1  # BOS precedes every sample
    return vocabulary


def losses_of(model: Any, vocabulary: Vocabulary, *, packing: bool) -> Loss:
    rng = np.random.default_rng(0)
    samples = [Tokens(b"", rng.integers(0, 400, n), np.zeros(n, dtype=np.int64)) for n in LENGTHS]
    masks = [rng.random(n) < 0.8 for n in LENGTHS]
    labels = labels_from([s.ids[mask] for s, mask in zip(samples, masks, strict=True)], [None] * len(samples))
    labels = labels.to(model.device.type)
    student = Student(StudentModule(model), vocabulary, Path(), model.device.type, False, packing)
    return Loss(*student.compute(samples, masks, partial(head_loss, labels=labels, objective=Objective())))


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma3, window of 8": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, **NO_DROPOUT)
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_packing_changes_no_loss_and_no_gradient(
    kind: str, attention: str, vocabulary: Vocabulary, device: str
) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[kind]()
    model.to(device)
    model.set_attn_implementation(attention)
    assert packing_is_isolated(model)
    gradients = []
    losses = []
    for packing in (True, False):
        model.zero_grad()
        loss = losses_of(model, vocabulary, packing=packing)
        loss.total.backward()
        losses.append(loss)
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(losses[0].ce_T, losses[1].ce_T, atol=1e-5, rtol=1e-5)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_state_space_model_that_carries_state_between_samples_is_detected() -> None:
    """A new model has small weights, so that the leak is small."""
    torch.manual_seed(0)
    mamba: Any = {"mamba_d_state": 8, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}
    assert not packing_is_isolated(JambaForCausalLM(JambaConfig(**SIZES, **mamba, num_experts=2)))


def test_a_model_that_mixes_samples_of_a_row_is_detected(caplog: pytest.LogCaptureFixture) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    decoder = model.get_decoder()
    forward = decoder.forward

    def mixing_forward(**given: Any) -> Any:
        out = forward(**given)
        out.last_hidden_state = out.last_hidden_state.cumsum(1)
        return out

    decoder.forward = mixing_forward
    assert not packing_is_isolated(model)
    assert "LlamaForCausalLM mixes the samples of one row" in caplog.text
