"""The student: a causal language model in training, split into decoder and LM head.

The decoder computes hidden states. The head turns selected hidden states into logits, so that the loss controls how
many logits exist at the same time. Trained weights are float32; products may be computed in bf16.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from alignment import Vocabulary
from alignment.offsets import Tokens
from teachers.model_loading import load_model
from trainer.losses.lm_head import LMHead
from trainer.student.config import LoraConfig
from trainer.student.fsdp import all_unsharded
from trainer.student.hf_directory import write_hf_directory
from trainer.student.lora import merge_adapters
from trainer.student.packing import pack
from trainer.student.router_loss import RouterLoss

T = TypeVar("T")

# shapes: B rows of L tokens, T selected positions, D hidden size

HeadFunction = Callable[[LMHead, Tensor], tuple[Tensor, ...]]
"""Function of the LM head and hidden states [T, D], for example a loss."""


def lm_head_of(model: Any) -> LMHead:
    """Return the model's output projection with the scale and soft cap of its family."""
    projection, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    return LMHead(projection.weight, getattr(projection, "bias", None), scale, cap)


class StudentModule(nn.Module):
    """The model in one module with every function that needs its weights.

    FSDP gathers the weights of a module during its forward pass, so the weights outside the layers, such as the head's,
    are complete only in `forward`.
    """

    def __init__(self, model: Any, router_loss: RouterLoss | None = None) -> None:
        super().__init__()
        self.model = model
        self.router_loss = router_loss

    def forward(self, function: Callable[[Any], T]) -> T:
        """Return the result of a function of the model."""
        return function(self.model)


@dataclass(frozen=True, eq=False)
class Student:
    """The model in training with its vocabulary.

    folder    the base model's Hugging Face directory
    autocast  whether products are computed in bf16 by autocast (with several ranks, FSDP does it instead)
    packing   whether a row may hold several samples, because samples in one row do not attend to each other
    lora      the adapters' configuration, if adapters are trained
    """

    module: StudentModule
    vocabulary: Vocabulary
    folder: Path
    device: str
    autocast: bool
    packing: bool
    lora: LoraConfig | None = None

    @property
    def model(self) -> Any:
        return self.module.model

    @property
    def router_loss(self) -> RouterLoss | None:
        return self.module.router_loss

    @property
    def first_position(self) -> int:
        """Index of the first token that the model predicts: 0 if BOS precedes the sample, else 1."""
        return 0 if self.vocabulary.prefix else 1

    @property
    def max_tokens(self) -> int:
        """The longest window in tokens, without BOS."""
        limit: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 31)
        return limit - len(self.vocabulary.prefix)

    def _autocast(self) -> AbstractContextManager[Any]:
        device_type = self.device.partition(":")[0]
        return torch.autocast(device_type, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def num_inputs(self, samples: Sequence[Tokens]) -> int:
        """Number of tokens of the samples that the model reads, BOS included."""
        return sum(len(self.vocabulary.prefix) + len(tokens) for tokens in samples)

    def compute(
        self,
        samples: Sequence[Tokens],
        masks: Sequence[NDArray[np.bool_]],
        function: HeadFunction,
        *,
        router_loss: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return `function` of the LM head and of the hidden states [T, D] that predict the selected tokens.

        With `router_loss`, the last result is the unweighted auxiliary loss of the router, if the student has one.

        masks[i] selects tokens of samples[i] from `first_position` on. The states are concatenated in the order of the
        samples. This is the only access to hidden states, because sharded weights exist only during the forward pass.
        """
        prefix = self.vocabulary.prefix
        sequences = [np.concatenate([prefix, tokens.ids]).astype(np.int64) for tokens in samples]
        packed = pack(sequences, masks, share_rows=self.packing)
        arrays = (packed.ids_BL, packed.positions_BL, packed.states_T, packed.is_token_BL)
        ids_BL, positions_BL, states_T, is_token_BL = (torch.from_numpy(a).to(self.device) for a in arrays)
        router = self.router_loss if router_loss else None

        def run(model: Any) -> tuple[Tensor, ...]:
            outputs = model.get_decoder()(
                input_ids=ids_BL,
                position_ids=positions_BL,
                use_cache=False,
                **({} if router is None else {"output_router_logits": True}),
            )
            results = function(lm_head_of(model), outputs.last_hidden_state.flatten(0, 1)[states_T])
            return results if router is None else (*results, router.compute(outputs.router_logits, is_token_BL))

        with self._autocast():
            result: tuple[Tensor, ...] = self.module(run)
        return result

    def infer(self, function: Callable[[Any], T]) -> T:
        """Return `function` of the model in evaluation mode, without gradients and with all weights unsharded.

        All ranks must call it together. The function must not communicate with other ranks.
        """

        def run(model: Any) -> T:
            with all_unsharded(self.module):
                return function(model)

        self.module.eval()
        try:
            # every length of a sequence would be compiled again
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), self._autocast():
                result: T = self.module(run)
        finally:
            self.module.train()
        return result

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, unsharded and on the CPU, with adapters merged; empty except on the first rank.

        All ranks must call it together.
        """
        unsharded = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=unsharded)
        return merge_adapters(self.folder, self.lora, weights) if self.lora and weights else weights

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write `weights` as a Hugging Face directory that transformers and vLLM load."""
        model = self.model if self.lora is None else load_model(self.folder, torch.float32)
        write_hf_directory(model, weights, base=self.folder, folder=folder)
