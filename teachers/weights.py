"""A model directory as a model, for students and teachers alike: all of its weights, computed as its family does.

transformers makes up the weights that the files lack, with a warning, and its usual attention leaves a soft cap out.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Raises ValueError if the files lack weights, and what transformers raises for a folder that it cannot load."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # Gemma 2
    attention = {"attn_implementation": "eager"} if capped else {}
    loader: Any = AutoModelForCausalLM
    model, said = loader.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True, **attention
    )
    if missing := sorted(said["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} of the model's weights, such as {missing[0]}")
    return model
