"""Record formats: detected by columns, reported, chosen by the run file, and invalid records named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.corpora import load
from trainer.errors import DataError
from trainer.sources import table_documents
from trainer.sources.corpus import Corpus
from trainer.sources.record_formats import RECORD_FORMATS

Row = dict[str, Any]


def load_rows(folder: Path, *rows: Row, max_invalid: int = 0, **source: Any) -> Corpus:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load({"files": [str(path)]} | source, max_invalid=max_invalid)


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str, **keys: Any) -> Row:
    return {"role": "assistant", "content": content} | keys


def tool(content: str, **keys: Any) -> Row:
    return {"role": "tool", "content": content} | keys


SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [user("How heavy?"), assistant("14.5 kg")]
SHAREGPT = [{"from": "human", "value": "How heavy?"}, {"from": "gpt", "value": "14.5 kg"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CHATS = [
    ({"messages": CHAT}, "column messages", CHAT),
    ({"messages": SHAREGPT, "id": 3}, "column messages", CHAT),
    ({"messages": json.dumps(CHAT)}, "column messages", CHAT),
    ({"conversations": SHAREGPT}, "column conversations", CHAT),
    ({"conversations": CHAT, "system": "Be brief."}, "columns conversations, system", [SYSTEM, *CHAT]),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "columns prompt, completion", CHAT),
    (
        {"prompt": [*CHAT, user("Sure?")], "completion": [assistant("Yes.")]},
        "columns prompt, completion",
        [CHAT[0], assistant("14.5 kg", train=False), user("Sure?"), assistant("Yes.")],
    ),
    (
        {"prompt": [*CHAT, tool("3")], "completion": [tool("4"), *CHAT[1:]]},
        "columns prompt, completion",
        [CHAT[0], assistant("14.5 kg", train=False), tool("3", train=False), tool("4"), CHAT[1]],
    ),
    ({"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:])}, "columns prompt, completion", CHAT),
    ({"instruction": "How", "input": "heavy?", "output": "x"}, "columns instruction, output, input",
     [user("How\nheavy?"), assistant("x")]),
    ({"instruction": "How?", "input": "", "output": "x"}, "columns instruction, output, input",
     [user("How?"), assistant("x")]),
    ({"instruction": "How?", "output": "x"}, "columns instruction, output", [user("How?"), assistant("x")]),
    ({"instruction": "a", "output": "x", "system": "Be brief.", "history": [["b", "c"]]},
     "columns instruction, output, system, history", [SYSTEM, user("b"), assistant("c"), user("a"), assistant("x")]),
    ({"question": "How?", "answer": "x"}, "columns question, answer", [user("How?"), assistant("x")]),
    ({"question": "How?", "answer": "x", "loss_mask": [0, 0]}, "columns question, answer, loss_mask",
     [user("How?"), assistant("x", train=False)]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "messages"), CHATS)
def test_chats_are_detected_by_their_columns(tmp_path: Path, row: Row, columns: str, messages: list[Row]) -> None:
    corpus = load_rows(tmp_path, row)
    assert corpus.sources[0].format == f"chats: {columns}"
    assert corpus.has_chats
    assert [list(sample.messages) for sample in corpus.train] == [messages]
    assert corpus.train[0].name == "d.jsonl:1"


def test_tools_are_read_beside_every_chat(tmp_path: Path) -> None:
    for row in ({"messages": CHAT}, {"question": "How?", "answer": "x"}):
        corpus = load_rows(tmp_path, row | {"tools": json.dumps([{"name": "f"}])})
        assert list(corpus.train[0].tools) == [TOOL]
        assert corpus.sources[0].format.endswith(", tools")


def test_a_prompt_of_text_is_masked_and_its_record_is_one_window(tmp_path: Path) -> None:
    completion = "Fifteen kilograms and a half, with the rope. " * 30
    corpus = load_rows(
        tmp_path, {"prompt": "Wie schwer? é ", "completion": completion}, {"prompt": "", "completion": "y z"}
    )
    first, second = corpus.train
    assert corpus.sources[0].format == "texts with a masked prompt: columns prompt, completion"
    assert not corpus.has_chats
    assert first.text == "Wie schwer? é " + completion
    assert first.prompt_bytes == len("Wie schwer? é ".encode())
    assert (second.text, second.prompt_bytes) == ("y z", 0)
    assert (first.name, corpus.sources[0].windows) == ("d.jsonl:1", 2)


def test_the_run_file_names_other_columns(tmp_path: Path) -> None:
    row = {"text": "a b c", "body": "d e f", "chat": CHAT, "messages": CHAT}
    assert load_rows(tmp_path, row, text_column="body").train[0].text == "d e f"
    assert list(load_rows(tmp_path, row, messages_column="chat").train[0].messages) == CHAT
    assert load_rows(tmp_path, row, record_format="text").train[0].text == "a b c"
    assert load_rows(tmp_path, {"conversations": SHAREGPT}, messages_column="conversations").has_chats


@pytest.mark.parametrize(
    ("template", "text", "prompt_bytes"),
    [
        ({"text": "Q: {q}\nA: {a} {n} {{}}"}, "Q: Wie? é\nA: ja 3 {{}}", 0),
        ({"prompt": "Q: {q}\n", "completion": "{a}"}, "Q: Wie? é\nja", 11),
    ],
)
def test_a_template_makes_texts_of_columns(tmp_path: Path, template: Row, text: str, prompt_bytes: int) -> None:
    sample = load_rows(tmp_path, {"q": "Wie? é", "a": "ja", "n": 3}, template=template).train[0]
    assert (sample.text, sample.prompt_bytes) == (text, prompt_bytes)


def test_a_template_makes_chats_of_columns(tmp_path: Path) -> None:
    template = {"system": "Be {how}.", "user": "{q}", "assistant": "{a}"}
    corpus = load_rows(tmp_path, {"q": "How heavy?", "a": "14.5 kg", "how": "brief"}, template=template)
    assert list(corpus.train[0].messages) == [SYSTEM, *CHAT]
    assert corpus.sources[0].format == "chats: columns how, q, a"
    with pytest.raises(DataError, match=r"line 1: 'a' is list, expected a string or a number"):
        load_rows(tmp_path, {"q": "", "a": [], "how": ""}, template=template)


def test_several_formats_that_fit_are_an_error_with_both_and_the_key(tmp_path: Path) -> None:
    row = {"text": "Below is an instruction.", "instruction": "a", "input": "", "output": "b"}
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, row)
    assert "the record formats text (columns text) and instruction (columns instruction, output)" in str(caught.value)
    for name in re.findall(r'"(\w+)"', str(caught.value)):
        assert load_rows(tmp_path, row, record_format=name).sources[0].documents == 1


def test_a_chat_in_a_column_of_another_name_is_an_error_with_the_key(tmp_path: Path) -> None:
    row = {"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="'dialog' is a list of objects: set messages_column = \"dialog\" if they are"):
        load_rows(tmp_path, row)
    assert load_rows(tmp_path, row, messages_column="dialog").sources[0].is_chat


def test_missing_columns_are_an_error_with_those_that_exist(tmp_path: Path) -> None:
    row = {"body": "a b c", "kind": "x"}
    with pytest.raises(
        DataError, match=r"d.jsonl has the columns of no record format; it has body, kind, and the form"
    ):
        load_rows(tmp_path, row)
    keys: list[Row] = [{"text_column": "none"}, {"messages_column": "none"}, {"template": {"text": "{none}"}}]
    for source in [*keys, *({"text_column": "body", key: "none"} for key in ("domain_column", "teacher_column"))]:
        with pytest.raises(DataError, match=r"d.jsonl has no column 'none'; it has body, kind"):
            load_rows(tmp_path, row, **source)


def test_records_of_another_form_are_invalid_and_named(tmp_path: Path) -> None:
    chat: Row = {"prompt": [user("a")], "completion": [assistant("b")]}
    rows: list[Row] = [{"prompt": "a ", "completion": "b"}, chat, {"completion": "x"}]
    corpus = load_rows(tmp_path, *rows, max_invalid=2)
    assert corpus.sources[0].documents == 1
    assert [message.partition("line ")[2] for message in corpus.sources[0].first_invalid] == [
        "2: 'prompt' is list, expected a string",
        "3: 'prompt' is missing, expected a string",
    ]
    with pytest.raises(DataError, match="line 2: message 0: the role 'wizard'; the roles are system"):
        load_rows(tmp_path, {"messages": CHAT}, {"messages": [{"role": "wizard", "content": "x"}]})
    with pytest.raises(DataError, match="line 2: it has images; text is used only"):
        load_rows(tmp_path, {"messages": CHAT}, {"messages": CHAT, "images": ["a.png"]})


def test_json_text_that_is_no_list_of_messages_is_a_prompt(tmp_path: Path) -> None:
    for prompt in ("[1, 2]", "[no", "[]", '[{"a": 1}]'):
        (sample,) = load_rows(tmp_path, {"prompt": prompt, "completion": " x y"}).train
        assert sample.text == f"{prompt} x y"
    chat: Row = {"prompt": json.dumps(CHAT), "completion": [assistant("b")]}
    with pytest.raises(DataError, match="line 2: 'prompt': text that is not JSON: 'How"):
        load_rows(tmp_path, chat, chat | {"prompt": "How heavy?"})
    with pytest.raises(DataError, match="line 2: 'completion': received null, expected a list of messages"):
        load_rows(tmp_path, chat, chat | {"completion": ""})


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": [user("a"), assistant("b", train=True)]}, "message 1: train"),
        ({"prompt": [user("a"), assistant("b")], "loss_mask": [0, 1, 1]}, "message 1: the loss_mask column"),
    ],
)
def test_a_message_of_a_prompt_cannot_be_supervised(tmp_path: Path, row: Row, key: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {key} is 1 in a message of the prompt, which is not supervised"):
        load_rows(tmp_path, row | {"completion": CHAT[1:]})


def test_a_message_of_a_prompt_may_have_the_default_weight_or_be_empty(tmp_path: Path) -> None:
    prompt = [user("a"), assistant("b", weight=1), assistant("", train=None)]
    (sample,) = load_rows(tmp_path, {"prompt": prompt, "completion": CHAT[1:], "loss_mask": [0, None, None, 1]}).train
    assert [message.get("train", True) for message in sample.messages] == [True, False, False, True]


def test_a_loss_mask_of_texts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a column 'loss_mask', .* but its records are texts: remove or rename"):
        load_rows(tmp_path, {"text": "a b c", "loss_mask": [1, 0]})


def test_the_files_of_a_source_have_one_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"a.jsonl has texts: column text, .*b.jsonl has chats: column messages: list th"
    ):
        load({"files": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]})


def test_empty_records_are_counted(tmp_path: Path) -> None:
    assert load_rows(tmp_path, {"text": "a b c"}, {"text": ""}).sources[0].empty == 1
    assert load_rows(tmp_path, {"messages": CHAT}, {"messages": []}).sources[0].empty == 1


def test_a_change_of_the_record_format_leads_to_another_index(tmp_path: Path) -> None:
    row = {"text": "a b c", "question": "a?", "answer": "b"}
    fingerprints = {load_rows(tmp_path, row, record_format=name).fingerprint for name in ("text", "question_answer")}
    templates: list[Row] = [{"text": "{text} {answer}"}, {"text": "{answer} {text}"}]
    fingerprints |= {load_rows(tmp_path, row, template=template).fingerprint for template in templates}
    assert len(fingerprints) == 4


def test_every_format_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("## Record formats")[2], re.MULTILINE)
    assert rows == [*RECORD_FORMATS]


def test_a_prompt_needs_a_completion(tmp_path: Path) -> None:
    template = {"prompt": "{a}", "completion": "{b}"}
    cases: list[tuple[Row, Row]] = [
        ({"prompt": "x", "completion": ""}, {}),
        ({"a": "x", "b": ""}, {"template": template}),
    ]
    for row, source in cases:
        with pytest.raises(DataError, match="line 1: the completion is empty, expected the text to train on"):
            load_rows(tmp_path, row, **source)


def test_a_chosen_format_without_its_columns_is_an_error_with_those_that_exist(tmp_path: Path) -> None:
    for name in set(RECORD_FORMATS) - {"template"}:
        with pytest.raises(DataError, match=r"d.jsonl has no column '\w+'; it has body"):
            load_rows(tmp_path, {"body": "a b c"}, record_format=name)


def test_a_record_that_is_one_window_has_a_maximum_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_documents, "MAX_WHOLE_BYTES", 1000)
    words = "sack " * 200
    rows: dict[str, Row] = {
        "the chat": {"messages": [user("x"), assistant(words)]},
        "the prompt with its completion": {"prompt": words, "completion": "x"},
    }
    for subject, row in rows.items():
        first = {key: CHAT if key == "messages" else "x" for key in row}
        with pytest.raises(DataError, match=rf"line 2: {subject} has 1,0\d\d bytes, expected at most 1,000: shorten"):
            load_rows(tmp_path, first, row)
    assert len(load_rows(tmp_path, {"text": words}).train) > 1
