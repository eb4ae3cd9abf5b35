"""200 texts that SmolLM2 wrote (tests/real/sample_rollouts.py): how many tokens differ from the tokenizer's own.

The test needs the tokenizer of the model only.
"""

import json
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pytest

from alignment import Tokens, Vocabulary
from alignment.sampled_tokens import are_equal, complete_length, num_noncanonical, transfer_target
from alignment.target import target_from_entries
from tests.real.sample_rollouts import ROLLOUTS

pytestmark = pytest.mark.slow


class Rollout(NamedTuple):
    """The ids of prompt and continuation, cut at the last whole character."""

    num_prompt: int
    ids: list[int]
    num_cut: int
    canonical: Tokens
    sampled: Tokens


@pytest.fixture(scope="module")
def rollouts(smollm2_vocabulary: Vocabulary) -> list[Rollout]:
    found = []
    for stored in json.loads(ROLLOUTS.read_text(encoding="utf-8")):
        prompt = smollm2_vocabulary.encode(stored["prompt"])
        assert prompt.ids.tolist() == stored["prompt_ids"]
        found.append(rollout_of(smollm2_vocabulary, prompt, stored["sampled_ids"]))
    return found


def rollout_of(vocabulary: Vocabulary, prompt: Tokens, ids: list[int]) -> Rollout:
    num_written = len(ids) - (ids[-1] == vocabulary.roles["eos"])
    length = complete_length(vocabulary, ids[:num_written])
    kept = ids if length == num_written else ids[:length]
    closes = len(kept) > length
    pieces = [vocabulary.token_bytes[i] or b"" for i in kept[:length]]
    sampled = prompt.continued(b"".join(pieces), kept[:length], [len(piece) for piece in pieces])
    canonical = vocabulary.encode(sampled.text.decode(), close=closes)
    sampled = sampled.with_end_token(kept[-1]) if closes else sampled
    return Rollout(len(prompt), prompt.ids.tolist() + kept, len(ids) - len(kept), canonical, sampled)


def blocks(vocabulary: Vocabulary, rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """Indices of the canonical and of the sampled tokens of each block, from the bytes of the tokens alone."""
    sides = []
    for ids in (rollout.canonical.ids.tolist(), rollout.ids):
        pieces = [vocabulary.token_bytes[i] or b"\0" for i in ids]  # EOS, as one byte
        sides.append(list(accumulate(len(piece) for piece in pieces)))
    found, begins = [], [0, 0]
    for end in sorted(set(sides[0]) & set(sides[1])):
        stops = [ends.index(end) + 1 for ends in sides]
        found.append((list(range(begins[0], stops[0])), list(range(begins[1], stops[1]))))
        begins = stops
    return found


def test_the_tokens_of_a_rollout_write_its_bytes(smollm2_vocabulary: Vocabulary, rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        pieces = [smollm2_vocabulary.token_bytes[i] or b"" for i in rollout.ids]
        assert rollout.sampled.text == b"".join(pieces)
        assert rollout.sampled.ids.tolist() == rollout.ids
        assert rollout.sampled.bytes_per_token.tolist() == [len(piece) for piece in pieces]


def test_a_seventh_of_the_rollouts_and_one_percent_of_the_tokens_are_tokenized_differently(
    smollm2_vocabulary: Vocabulary, rollouts: list[Rollout]
) -> None:
    counts = {"rollouts": len(rollouts), "differ": 0, "tokens": 0, "in blocks": 0, "without a row": 0, "cut": 0}
    for rollout in rollouts:
        differing = [
            own
            for canonical, own in blocks(smollm2_vocabulary, rollout)
            if [rollout.canonical.ids[i] for i in canonical] != [rollout.ids[i] for i in own]
        ]
        counts["differ"] += bool(differing)
        counts["tokens"] += len(rollout.ids) - rollout.num_prompt
        counts["in blocks"] += sum(map(len, differing))
        counts["without a row"] += num_noncanonical(rollout.canonical, rollout.sampled)
        counts["cut"] += rollout.num_cut
    assert counts == {
        "rollouts": 200, "differ": 29, "tokens": 7696, "in blocks": 68, "without a row": 33, "cut": 1
    }  # fmt: skip


def test_rollouts_can_differ_although_every_token_has_a_row(rollouts: list[Rollout]) -> None:
    """Each differing block has one sampled token for two canonical tokens, such as two line breaks."""
    differing = [rollout for rollout in rollouts if rollout.canonical.ids.tolist() != rollout.ids]
    with_all_rows = [rollout for rollout in differing if not num_noncanonical(rollout.canonical, rollout.sampled)]
    assert (len(differing), len(with_all_rows)) == (29, 3)
    assert sum(are_equal(rollout.canonical, rollout.sampled) for rollout in rollouts) == len(rollouts) - len(differing)
    assert not any(are_equal(rollout.canonical, rollout.sampled) for rollout in with_all_rows)


def test_only_the_tokens_after_the_first_of_a_differing_block_are_invalid(
    smollm2_vocabulary: Vocabulary, rollouts: list[Rollout]
) -> None:
    for rollout in rollouts:
        num_rows = len(rollout.canonical)
        rows = np.repeat(np.arange(num_rows), 2)
        ids = np.stack([np.arange(num_rows), num_rows + rollout.canonical.ids], axis=1).ravel().astype(np.int32)
        probs = np.tile([0.5, 0.25], num_rows)
        target = target_from_entries(rows, ids, probs, np.ones(num_rows, dtype=bool))
        transferred = transfer_target(target, rollout.canonical, rollout.sampled)
        expected: list[tuple[bool, float, dict[int, float]]] = []
        for canonical, own in blocks(smollm2_vocabulary, rollout):
            first = canonical[0]
            row = {first: 0.5, num_rows + int(rollout.canonical.ids[first]): 0.25}
            expected += [(True, 0.25, row)] + [(False, 0.0, {})] * (len(own) - 1)
        received = []
        for i, valid in enumerate(transferred.valid.tolist()):
            entries = slice(transferred.offsets[i], transferred.offsets[i + 1])
            row = dict(zip(transferred.ids[entries].tolist(), transferred.probs[entries].tolist(), strict=True))
            received.append((valid, float(transferred.tail[i]), row))
        assert received == expected
