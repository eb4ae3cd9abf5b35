"""Settings of the student model."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config_section import PathText, Positive, Roles, Section


class LoraConfig(Section):
    """[student.lora] Train low-rank adapters; the export merges them into the weights."""

    rank: Annotated[int, Field(gt=0, le=65_536)] = 16
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of an adapter's inputs that is dropped in training."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, as in peft; `all-linear` leaves out the LM head."""


def _is_device(name: str) -> str:
    if not re.fullmatch(r"cpu|(cuda|mps|xpu)(:[0-9]{1,3})?", name):
        raise ValueError("expected cpu, cuda or cuda:N")
    return name


class StudentConfig(Section):
    """[student] The model that is trained."""

    model: PathText
    """A Hugging Face model directory, or the name of one under $TUTELAGE_CACHE/models."""
    device: Annotated[str, AfterValidator(_is_device)] = "cpu"
    """Device to train on: cpu, cuda, cuda:1, … With several processes, `cuda` gives each process its own GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`bf16` computes matrix products in bf16 over float32 weights (frozen matrices that bf16 represents exactly are
    stored in bf16); with several processes, norms and sums within a layer are computed in bf16 too. `fp32` computes
    everything in float32. `auto` is bf16 on GPUs and on CPUs with bf16 instructions, fp32 otherwise. A resumed run
    keeps the precision that `auto` chose at its first start."""
    activation_checkpointing: bool = False
    """Store only each layer's input and recompute the layer in the backward pass: less memory, about a third more
    time."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    train_layers: Positive | None = None
    """Train only this many of the uppermost layers and the final norm. All parameters are trained if it is not set."""
    lora: LoraConfig | None = None
    """[student.lora] Train adapters instead of the weights."""
    router_aux_loss_weight: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Weight of the router's auxiliary loss of a mixture-of-experts model, which balances the load of the experts. If
    it is not set, the model's config decides as in transformers: `router_aux_loss_coef` if `output_router_logits` is
    true, else 0."""
    roles: Roles = {}
    """Special tokens by role (bos, eos, end_of_turn, pad, unk), given as token strings, where the tokenizer's own
    configuration is wrong."""
    chat_template: PathText | None = None
    """File with a chat template that replaces the model's own."""
