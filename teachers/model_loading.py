"""Load a model directory with transformers, for students and teachers, and choose the type to compute in.

transformers initializes missing weights at random with only a warning, and its default attention ignores soft caps.
load_model treats both cases correctly. Code in the directory is never executed. Implementations of attention and
experts that config.json names are ignored, because transformers would download them as kernels.
"""

import platform
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from teachers.model_checks import ModelFiles, QuantizedError, check_model_files, model_errors
from teachers.model_heads import check_head_files

NO_CODE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every `from_pretrained`: without them transformers asks on standard input whether to execute code."""
MAX_EXCESS = 2.0  # a config may declare this many times the stored values, see _check_size
MIN_EXCESS = 1 << 24
MEASURE_S = 0.05  # per type, in bf16_is_native


def load_config(folder: Path) -> Any:
    """Read the configuration of a causal language model, and check it against the headers of the weights.

    Implementations that config.json names are ignored. Raises QuantizedError for quantized weights, which transformers
    would load with kernels from the network, and ModelError for any other reason.
    """
    files = check_model_files(folder)
    if files.quantization is not None:
        raise QuantizedError(f"cannot load {folder}: its weights are quantized ({files.quantization})")
    with model_errors(folder):
        config = read_config(folder)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"transformers has no causal language model for {config.model_type}")
        _check_size(config, files)
    check_head_files(folder, bool(config.get_text_config().tie_word_embeddings))
    return config


def check_for_vllm(folder: Path) -> None:
    """Make the checks of `load_model` for vLLM, which loads the weights itself. Raises ModelError.

    Quantized weights are left to vLLM, and so are architectures that transformers does not know.
    """
    files = check_model_files(folder)
    try:
        config = read_config(folder)
    except Exception:  # a configuration of vLLM's own; AutoConfig raises any class
        config = None
    if config is not None:
        check_head_files(folder, bool(config.get_text_config().tie_word_embeddings))
    if files.quantization is None:
        with model_errors(folder):
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                        check_finite(name, tensors.get_tensor(name))


def read_config(folder: Path) -> Any:
    """Read config.json with transformers. Implementations of attention and experts that it names are removed."""
    config: Any = AutoConfig.from_pretrained(folder, **NO_CODE)
    config._attn_implementation = None  # these two setters include the sections
    config._experts_implementation = None
    return config


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a causal language model.

    Raises ModelError if the directory cannot be loaded, if weights are missing, or if one is NaN or infinite.
    """
    config = load_config(folder)
    has_soft_cap = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None  # Gemma 2
    attention = {"attn_implementation": "eager"} if has_soft_cap else {}
    loader: Any = AutoModelForCausalLM
    with model_errors(folder):
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported here, in one sentence
            output_loading_info=True,
            **NO_CODE,
            **attention,
        )
        if info["mismatched_keys"]:
            name, stored, declared = min(info["mismatched_keys"])
            raise ValueError(f"the weight {name} has shape {list(stored)}, its config.json declares {list(declared)}")
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} of the model's weights, for example {missing[0]}")
        for name, parameter in model.named_parameters():
            check_finite(name, parameter.detach())
    return model


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError if a weight is NaN or infinite.

    Minimum and maximum of a tensor detect both cases, and are computed faster than `torch.isfinite`.
    """
    if weight.is_floating_point() and weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
        raise ValueError(f"the weight {name} has values that are NaN or infinite")


def _check_size(config: Any, files: ModelFiles) -> None:
    """Raise ValueError if the model that a configuration declares is much larger than the stored weights.

    The model is built on the meta device, without memory. Individual missing weights are reported by `load_model`.
    """
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=False)
    declared = sum(parameter.numel() for parameter in model.parameters())
    if declared > MAX_EXCESS * files.num_elements + MIN_EXCESS:
        raise ValueError(f"config.json declares {declared} weights, its files have {files.num_elements}")


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
