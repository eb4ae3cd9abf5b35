"""Folders of adapters for rollout servers: peft reads them, and damage is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from teachers.adapter_folder import check_adapter_folder, write_adapter_folder
from teachers.sync_folder import SyncFolderError, expected_shapes
from tests.tiny import save_tiny_model

LAYER = "model.layers.1.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose q_proj has the shape [64, 32]."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), head_dim=16)


def random_adapters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {A: torch.randn(4, 32, generator=generator), B: torch.randn(64, 4, generator=generator)}


def test_peft_reads_the_folder(tmp_path: Path, model: Path) -> None:
    from peft import PeftModel

    weights = random_adapters()
    weights |= {name.replace(".1.", ".0."): weight for name, weight in weights.items()}
    digest = write_adapter_folder(weights, tmp_path / "v1", alpha=8.0)
    check_adapter_folder(tmp_path / "v1", digest, expected_shapes(model))
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "v1")).merge_and_unload().state_dict()
    before = load_file(model / "model.safetensors")
    expected = 8.0 / 4 * weights[B].bfloat16().float() @ weights[A].bfloat16().float()
    torch.testing.assert_close(merged[f"{LAYER}.weight"] - before[f"{LAYER}.weight"], expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_no_adapters_and_several_ranks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    others = {name.replace(".1.", ".0."): weight for name, weight in random_adapters().items()}
    others = {name: weight[:2] if "lora_A" in name else weight[:, :2] for name, weight in others.items()}
    for weights in ({f"{LAYER}.weight": torch.ones(2, 2)}, random_adapters() | others):
        with pytest.raises(ValueError, match="expected weights of adapters|too many values"):
            write_adapter_folder(weights, tmp_path / "v1", alpha=8.0)
    assert list(tmp_path.iterdir()) == []


def other_rank(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("weights", "damage", "message"),
    [
        ({}, cut, r"adapter_model\.safetensors is damaged or truncated"),
        ({}, other_rank, r"adapter_config\.json states rank 5, the weights have 4"),
        ({}, lambda f: (f / "adapter_config.json").write_text("["), r"adapter_config\.json is no JSON object"),
        ({}, lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json cannot be read"),
        ({A: torch.full((4, 32), torch.nan)}, None, "lora_A.weight has values that are NaN"),
        ({A: torch.ones(4, 33)}, None, r"q_proj has adapters of shapes .*, expected A \[4, 32\] and B \[64, 4\]"),
        ({"lm_head.lora_A.weight": torch.ones(4, 32)}, None, "lm_head.lora_A.weight belongs to no layer"),
        ({A.replace(".1.", ".9."): torch.ones(4, 32)}, None, "belongs to no layer"),
        ({A.replace(".1.", ".0."): torch.ones(4, 32)}, None, r"layers\.0\.self_attn\.q_proj has adapters of shapes"),
    ],
)
def test_every_damage_is_refused_by_name(
    tmp_path: Path, model: Path, weights: dict[str, Tensor], damage: Callable[[Path], object] | None, message: str
) -> None:
    digest = write_adapter_folder(random_adapters() | weights, tmp_path / "v1", alpha=8.0)
    if damage is not None:
        damage(tmp_path / "v1")
    with pytest.raises(SyncFolderError, match=message):
        check_adapter_folder(tmp_path / "v1", digest, expected_shapes(model))
