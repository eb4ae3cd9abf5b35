"""Cached arrays: loaded again, computed again if damaged, written by several processes at once."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignment import translate
from alignment.array_cache import cache_key, load_arrays, save_arrays
from alignment.fusellm import TokenMap, token_map
from tests.kinds import vocabulary_of
from tests.tiny import Kind, tokenizer_json

TEACHER, STUDENT = vocabulary_of("sentencepiece"), vocabulary_of("byte_level")


def test_saved_arrays_are_loaded(tmp_path: Path) -> None:
    arrays = {"a": np.arange(7), "b": np.zeros((2, 3), dtype=np.float32)}
    save_arrays(tmp_path / "deep" / "x", arrays)
    loaded = load_arrays(tmp_path / "deep" / "x")
    assert loaded is not None
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert load_arrays(tmp_path / "absent") is None


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    else:
        data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "one byte changed"])
def test_a_damaged_file_is_computed_again(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    computed = translate(TEACHER, STUDENT, cache=tmp_path)
    (path,) = tmp_path.glob("translation-*")
    whole = path.read_bytes()
    _damage(path, how)
    again = translate(TEACHER, STUDENT, cache=tmp_path)
    assert "is damaged: its arrays are computed again" in caplog.text
    np.testing.assert_array_equal(again.tokens, computed.tokens)
    np.testing.assert_array_equal(again.offsets, computed.offsets)
    assert path.read_bytes() == whole


def test_a_cached_table_is_used_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = translate(TEACHER, STUDENT, cache=tmp_path)
    monkeypatch.setattr("alignment.translation._build_table", lambda *_: pytest.fail("the table was computed again"))
    loaded = translate(TEACHER, STUDENT, cache=tmp_path)
    for name in ("offsets", "tokens", "first"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(computed, name))
        assert getattr(loaded, name).dtype == getattr(computed, name).dtype


def test_different_roles_sizes_and_tokenizers_have_different_files(tmp_path: Path) -> None:
    translate(TEACHER, STUDENT, cache=tmp_path)
    translate(TEACHER, STUDENT, len(TEACHER) + 8, cache=tmp_path)
    translate(TEACHER, STUDENT.with_roles({"eos": "<|bos|>"}), cache=tmp_path)
    translate(STUDENT, TEACHER, cache=tmp_path)
    assert len(list(tmp_path.glob("translation-*"))) == 4
    assert cache_key("a", 1) != cache_key("a", 2)


TRANSLATE = """
import sys
from pathlib import Path
from alignment import Vocabulary, translate
teacher, student = (Vocabulary.parse(Path(f).read_bytes(), name=f) for f in sys.argv[2:])
print(translate(teacher, student, cache=Path(sys.argv[1])).tokens.sum())
"""


def test_several_processes_may_write_one_file_at_once(tmp_path: Path) -> None:
    kinds: tuple[Kind, Kind] = ("sentencepiece", "byte_level")
    for kind in kinds:
        (tmp_path / kind).write_text(tokenizer_json(kind))
    command = [sys.executable, "-c", TRANSLATE, str(tmp_path / "cache"), *(str(tmp_path / kind) for kind in kinds)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {process.communicate(timeout=60)[0] for process in processes}
    assert len(printed) == 1
    assert all(process.returncode == 0 for process in processes)
    (path,) = (tmp_path / "cache").iterdir()
    loaded = load_arrays(path)
    assert loaded is not None
    assert {f"{loaded['tokens'].sum()}\n"} == printed


def test_a_folder_that_cannot_be_written_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert translate(TEACHER, STUDENT, cache=tmp_path / "file").tokens.size
    assert "its arrays are not cached" in caplog.text


def test_a_token_map_loads_the_tokens_of_other_runs_and_processes(tmp_path: Path) -> None:
    one, two = (token_map(TEACHER, STUDENT, "min_ed", tmp_path) for _ in range(2))
    first, second = np.arange(40), np.arange(40, 80)
    expected = TokenMap(TEACHER, STUDENT, nearest=True)
    np.testing.assert_array_equal(one.student_ids(first), expected.student_ids(first))
    two.student_ids(second)
    one.save()
    two.save()
    known = token_map(TEACHER, STUDENT, "min_ed", tmp_path)
    known._compute = lambda ids: pytest.fail(f"{ids} were computed again")  # type: ignore[method-assign]
    np.testing.assert_array_equal(known.student_ids(np.arange(80)), expected.student_ids(np.arange(80)))


def test_a_token_map_has_no_counterpart_for_ids_that_the_tokenizer_lacks() -> None:
    assert TokenMap(TEACHER, STUDENT, nearest=True).student_ids(np.array([len(TEACHER) + 5])).tolist() == [-1]


def test_an_unknown_method_is_rejected_with_the_choices() -> None:
    with pytest.raises(ValueError, match="expected a method of em, min_ed, received 'dtw'"):
        token_map(TEACHER, STUDENT, "dtw")
