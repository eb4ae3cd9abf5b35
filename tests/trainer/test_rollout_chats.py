"""The beginning of an answer in the templates of several models, and answers that the student has sampled behind it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tiny import tiny_vocabulary
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.jinja_template import ChatError
from trainer.records import Rollout, Sample
from trainer.rollouts.config import RolloutConfig
from trainer.rollouts.prompts import PromptBuilder
from trainer.tokenization import SampleTokenizer

VOCABULARY = tiny_vocabulary("byte_level")
CHATML = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\nOPENING{% endif %}"
)
USER = [{"role": "user", "content": "How many sacks?"}]


def tokenizer(template: str, vocabulary: Any = VOCABULARY) -> SampleTokenizer:
    return SampleTokenizer(vocabulary, (), ChatTemplate.from_files({}, vocabulary, "tiny", template=template))


def answered(student: SampleTokenizer, answer: str, ended: bool) -> Sample:
    """Return a sample whose answer the student has written, one byte per token."""
    builder = PromptBuilder(student, RolloutConfig(), 400)
    given = (*USER, {"role": "assistant", "content": "Fifty-one."})
    prompt = builder.with_prompt(Sample(0, "s", messages=given))
    ids = [VOCABULARY.token_bytes.index(bytes([byte])) for byte in answer.encode()]
    ids += [VOCABULARY.roles["eos"]] * ended
    rollout = Rollout(
        ids=tuple(ids),
        num_bytes=(*[1] * len(answer.encode()), *[0] * ended),
        logprobs=(-1.0,) * len(ids),
        entropies=(1.0,) * len(ids),
        num_cut=0,
        finish="eos" if ended else "length",
        version=0,
        prompt_crc=0,
        fingerprint=VOCABULARY.fingerprint,
    )
    return builder.sample(prompt, rollout)


def text_of(model: SampleTokenizer, sample: Sample) -> str:
    return model.tokenize(sample).tokens.text.decode()


WITHOUT_PROMPT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|eos|>{% endfor %}"
EOS_ONCE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|eos|>"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHATML.replace("OPENING", ""), "<user>\nHow many sacks?<|eos|>\n<assistant>\n"),
        (WITHOUT_PROMPT, "[user] How many sacks?<|eos|>[assistant]"),
        (EOS_ONCE, "user: How many sacks?\nassistant:"),
    ],
)
def test_the_prompt_ends_where_the_template_begins_the_content_of_an_answer(template: str, prompt: str) -> None:
    model = tokenizer(template).template
    assert model is not None
    tokens, start = model.continue_chat(USER)
    assert (tokens.text.decode(), start) == (prompt, len(prompt))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("answer", ["", " Fifty-one sacks. ", "<think>\nWell, there", "51 <|eos|>"])
def test_sampled_answers_stay_as_they_are_in_every_template(answer: str, ended: bool) -> None:
    student = tokenizer(CHATML.replace("OPENING", ""))
    trimming = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<|eos|>{% endfor %}")
    sample = answered(student, answer, ended)
    if not answer and not ended:
        with pytest.raises(ChatError, match="no predicted token"):
            student.tokenize(sample)
        return
    for model, before in ((student, "<assistant>\n"), (trimming, "<|eos|>assistant:")):
        tokenized = model.tokenize(sample)
        assert tokenized.tokens.text.decode().endswith(before + answer + "<|eos|>" * ended)
        assert tokenized.num_bytes_T.sum() == len(answer.encode())
        supervised = tokenized.tokens.ids[tokenized.supervised_T]
        assert tuple(supervised.tolist()) == (sample.rollout and sample.rollout.ids)
    canonical = student.tokenize_canonical(sample)
    assert canonical.tokens.text == student.tokenize(sample).tokens.text
    assert np.isin(VOCABULARY.roles["eos"], canonical.tokens.ids[-1:]) == ended


@pytest.mark.parametrize("of_student", ["", "<think>\n"])
@pytest.mark.parametrize("of_teacher", ["", "<think>\n"])
def test_a_thought_that_the_prompt_of_the_student_opens_is_open_for_every_teacher(
    of_student: str, of_teacher: str
) -> None:
    student, teacher = (tokenizer(CHATML.replace("OPENING", opening)) for opening in (of_student, of_teacher))
    other = replace(teacher, vocabulary=replace(VOCABULARY, fingerprint="other"))
    sample = answered(student, "I count. </think>51", True)
    for model in (student, teacher, other):
        assert text_of(model, sample).endswith(f"<assistant>\n{of_student}I count. </think>51<|eos|>")


def test_prompts_without_a_token_are_refused() -> None:
    builder = PromptBuilder(SampleTokenizer(VOCABULARY, ()), RolloutConfig(), 20)
    refused = builder.with_prompt(Sample(0, "s", text="a completion"))
    assert "its prompt has 0 tokens, expected 1 to 19" in str(refused.refusal)
    (first, *_) = [builder.with_prompt(Sample(0, "s", text="six sacks" * 9, prompt_bytes=80)).refusal]
    assert "raise data.window_tokens" in str(first)
