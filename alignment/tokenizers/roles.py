"""Special tokens by role, and whether a model expects BOS in front of every text."""

from collections.abc import Mapping
from typing import Any

from alignment.tokenizers.kinds import Spec, components

ROLES = ("bos", "eos", "end_of_turn", "pad", "unk")
# No config names the token that ends a turn. These are the tokens of the known families, the first match is used; a run
# file can set another one.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>", "<|return|>")


def roles_of(spec: Spec, config: Spec) -> dict[str, int]:
    """Return the ids of the special tokens by role. Roles that neither file names are missing."""
    ids = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    roles = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            roles[role] = ids[content]
    turn_ends = [ids[content] for content in END_OF_TURN if content in ids]
    return {"end_of_turn": turn_ends[0], **roles} if turn_ends else roles


def expects_bos(spec: Spec, config: Spec, roles: Mapping[str, int]) -> bool:
    """Return whether BOS belongs in front of every text.

    The first source that states it is used: the config, the template in tokenizer.json, the model family (a Gemma
    tokenizer expects BOS even if its config lost the flag).
    """
    if "bos" not in roles:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    template = [token for part in components(spec.get("post_processor")) for token in _template_tokens(part)]
    if any(roles["bos"] in token.get("ids", []) for token in template):
        return True
    return str(config.get("tokenizer_class", "")).startswith("Gemma")


def _template_tokens(component: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the special tokens that a TemplateProcessing puts around a text."""
    return list(component.get("special_tokens", {}).values()) if component.get("type") == "TemplateProcessing" else []
