"""Folders of LoRA adapters for rollout servers, in the format of peft, with the manifest of sync_folder.py.

adapter_model.safetensors  matrices A [rank, in] and B [out, rank] of every adapted layer, in bfloat16
adapter_config.json        rank, alpha and the names of the adapted layers
manifest.json              see sync_folder.py
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from teachers.protocol.untrusted_text import clean
from teachers.sync_folder import Shape, SyncFolderError, copied, read_file, read_tensors, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")  # of peft, in a file or a model


def write_adapter_folder(weights: Mapping[str, Tensor], folder: Path, alpha: float) -> str:
    """Write the adapters of a student to a folder, which appears when it is complete. Returns the manifest's digest.

    `weights` are named as peft names them in a model or in a file. Raises ValueError for other names.
    """
    tensors, modules, ranks = dict[str, Tensor](), set[str](), set[int]()
    for name, weight in weights.items():
        found = NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"expected weights of adapters, received {name}")
        tensors[f"base_model.model.{found[1]}.lora_{found[2]}.weight"] = copied(weight)
        modules.add(found[1].rpartition(".")[2])
        ranks.add(weight.shape[0] if found[2] == "A" else weight.shape[1])
    (rank,) = ranks
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "bias": "none",
    }
    return write_tensors(tensors, folder, WEIGHTS, {CONFIG: json.dumps(config).encode()})


def check_adapter_folder(folder: Path, digest: str, base: Mapping[str, Shape]) -> None:
    """Check adapters for a model whose weights have the shapes `base`. Raises SyncFolderError."""
    tensors = read_tensors(folder, digest, lambda shapes, where: _check_shapes(shapes, base, where))
    try:
        rank = json.loads(read_file(folder / CONFIG, MAX_CONFIG_BYTES)).get("r")
    except (ValueError, AttributeError, RecursionError) as error:
        raise SyncFolderError(f"{CONFIG} is no JSON object") from error
    expected = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    if rank != expected:
        raise SyncFolderError(f"{CONFIG} states rank {clean(rank, 40)}, the weights have {expected}")


def _check_shapes(shapes: Mapping[str, Shape], base: Mapping[str, Shape], where: str) -> None:
    """Raise SyncFolderError unless every layer has both matrices, in the shapes of its weight and of one rank."""
    layers: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        found = NAME.fullmatch(name)
        if found is None or f"{found[1]}.weight" not in base or found[1] == "lm_head":
            raise SyncFolderError(f"{where}: {clean(name, 80)} belongs to no layer of the model that can be adapted")
        layers[found[1]][found[2]] = tuple(shape)
    if not layers:
        raise SyncFolderError(f"{where}: there are no adapters")
    rank = next(iter(layers.values())).get("A", (0,))[0]
    for layer, matrices in layers.items():
        outputs, *inputs = base[f"{layer}.weight"]
        if matrices != {"A": (rank, *inputs), "B": (outputs, rank)}:
            raise SyncFolderError(
                f"{where}: {clean(layer, 80)} has adapters of shapes {clean(matrices, 80)}, expected "
                f"A {[rank, *inputs]} and B {[outputs, rank]}"
            )
