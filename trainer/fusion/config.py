"""Settings of the fusion of several teachers into one target."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config_section import Positive, Section, one_of
from trainer.fusion import FUSION_METHODS


class FusionConfig(Section):
    """[fusion] How several teachers become one target."""

    method: Annotated[str, one_of(FUSION_METHODS)] = "mean"
    """`mean`, `geometric`: weighted mean of probabilities, or of their logarithms. `min_ce`, `avg_ce`: the teacher that
    predicts the text best, or all teachers weighted by how well they predict it. `confidence`: weights by low entropy.
    `adaptive`: mean with weights from running bits per byte in each domain. `router`: the teacher that a column of the
    data names. `fusellm_*`: the two methods of the FuseLLM paper, for comparison."""
    scope: Literal["token", "sample", "batch"] = "sample"
    """What min_ce, avg_ce and confidence compare teachers over."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the softmax that turns bits per byte (avg_ce, adaptive) or entropy in nats (confidence) into
    weights."""
    top_k: Positive = 64
    """Number of entries kept in a row of the fused target; the rest is added to the tail. In text that the student
    wrote, the token of the text is always kept if a teacher lists it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How teacher weights move from `weight` to `final_weight` over the steps of the run."""
    half_life_bytes: Annotated[float, Field(gt=0)] = 1e6
    """adaptive: text of a domain counts half as much after this many more bytes of the domain."""
    margin_bpb: Annotated[float, Field(ge=0)] = 0.1
    """adaptive: a teacher this many bits per byte behind the best teacher of a domain has weight 0 there."""
