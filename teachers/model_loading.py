"""Load a model directory with transformers, for students and teachers, and choose the type to compute in.

transformers initializes missing weights at random with only a warning, and its default attention ignores soft caps.
load_model treats both cases correctly.
"""

import platform
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

MEASURE_S = 0.05  # per type, in bf16_is_native


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model.

    Raises ValueError if weights are missing, and the errors of transformers if the directory cannot be loaded.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    has_soft_cap = getattr(config, "attn_logit_softcapping", None) is not None  # Gemma 2
    attention = {"attn_implementation": "eager"} if has_soft_cap else {}
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True, **attention
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} of the model's weights, for example {missing[0]}")
    return model


def resolve_dtype(dtype: str, device: str) -> Literal["bfloat16", "float32"]:
    """Return the type to compute in. "auto" is bfloat16 if the device computes in it natively, else float32.

    Raises ValueError if `dtype` is not "auto", "bfloat16" or "float32".
    """
    match dtype:
        case "auto":
            return "bfloat16" if bf16_is_native(device) else "float32"
        case "bfloat16" | "float32":
            return dtype
    raise ValueError(f"dtype: expected auto, bfloat16 or float32, received {dtype!r}")


def bf16_is_native(device: str) -> bool:
    """Return whether a device ("cpu", "cuda", "cuda:1", …) multiplies bfloat16 matrices without emulation.

    True on GPUs. An x86 CPU needs AVX-512 BF16 or AMX; other CPUs are measured, which takes about 0.1 s.
    """
    if torch.device(device).type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may be missing
        return any(getattr(torch.cpu, name, lambda: False)() for name in probes)
    return _bf16_matmul_is_fast()


@cache
def _bf16_matmul_is_fast() -> bool:
    """Return whether a small bfloat16 matrix product is no slower than the same one in float32."""
    return _matmul_seconds(torch.bfloat16) <= _matmul_seconds(torch.float32)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Return the shortest time of a 256 × 256 product within MEASURE_S."""
    matrix = torch.ones(256, 256, dtype=dtype)
    matrix @ matrix  # the first product includes one-time initialization
    best, end = float("inf"), time.perf_counter() + MEASURE_S
    while (began := time.perf_counter()) < end:
        matrix @ matrix
        best = min(best, time.perf_counter() - began)
    return best
