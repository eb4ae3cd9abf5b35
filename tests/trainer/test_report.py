"""`tutelage report`: a self-contained page for complete, incomplete and damaged runs."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.trainer.made_runs import Values, write_run
from tests.trainer.runs import run_config, served_models, write_corpus
from tests.trainer.test_cli import assert_one_sentence, call
from trainer.report.page import make_report
from trainer.training.loop import train

VOID = ("meta", "link", "img", "br", "hr", "input", "path")


class Page(HTMLParser):
    """A parsed page: its texts and its tags with their attributes. Fails if tags are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def figures(self) -> list[str]:
        """Labels of the charts: title and x axis."""
        return [str(attributes["aria-label"]) for tag, attributes in self.tags if tag == "svg"]


def page_of(folder: Path, baseline: Path | None = None) -> Page:
    return Page(make_report(folder, baseline).page)


def assert_self_contained(page: str) -> None:
    parsed = Page(page)
    loads = [
        value
        for _, attributes in parsed.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data", "action", "xlink:href")
    ]
    assert not loads
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "iframe", "object", "embed", "img", "base")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path, tiny_sentencepiece: Path) -> Path:
    """Folder of a real run with two teachers and of its baseline, as `tutelage demo` writes them."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder)
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        train(run_config(tiny_byte_level, corpus, folder / "distilled", urls, eval={"every_steps": 2}))
    train(run_config(tiny_byte_level, corpus, folder / "baseline", [], eval={"every_steps": 2}))
    return folder


def test_a_distilled_run_is_compared_with_its_baseline(runs: Path) -> None:
    report = make_report(runs)
    assert_self_contained(report.page)
    page = Page(report.page)
    assert report.comparison is not None
    assert report.comparison.same_start
    assert not report.comparison.differs_in
    assert report.summary.finished
    assert report.result in page.text
    assert "The baseline without teachers has" in report.result
    assert report.summary.teachers.keys() == {"t0", "t1"}
    for title in ("Held-out bits per byte", "Training loss", "Weight of each teacher", "Time per step", "Throughput"):
        assert any(label.startswith(title) for label in page.figures), title
    assert all(label.endswith(" over tokens") for label in page.figures)
    for words in (
        "student",
        "baseline",
        "cross-entropy of the baseline",
        "divergence",
        "window_tokens 60",
        "method mean",
        "12 for training",
    ):
        assert words in page.text, words


def test_all_ways_to_name_the_baseline_give_the_same_page(runs: Path) -> None:
    page = make_report(runs).page
    assert make_report(runs / "distilled").page == page
    assert make_report(runs / "distilled", Path("baseline")).page == page
    assert make_report(runs / "distilled", runs / "baseline").page == page


def test_a_run_without_teachers_shows_none(runs: Path) -> None:
    report = make_report(runs / "baseline")
    page = Page(report.page)
    assert report.comparison is None
    assert not report.summary.teachers
    assert not [label for label in page.figures if "eacher" in label or "mass" in label]
    assert "times lost" not in page.text
    assert "Teachers over time" not in page.text
    assert "divergence" not in page.texts  # the name of a curve; the run file holds the word, too
    assert "baseline:" not in page.text


def test_a_run_with_an_incomplete_last_line_is_reported_up_to_it(runs: Path, tmp_path: Path) -> None:
    whole = (runs / "distilled" / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[: whole.index(b'"step": 5') + 40])
    report = make_report(tmp_path)
    assert (report.summary.steps, report.summary.planned_steps, report.summary.finished) == (4, 6, False)
    assert "incomplete" in Page(report.page).text
    assert "After 4 of 6 planned steps" in report.result


def test_lost_teachers_are_marked_in_the_charts_and_listed(tmp_path: Path) -> None:
    changes = {
        12: ("teacher_lost", "b", "no replica answered for 5 s"),
        25: ("teacher_joined", "b", "http://127.0.0.1:9 answers again"),
    }

    def teacher_values(step: int) -> Values:
        known = {"weight": 0.5, "mass": 0.9, "own_bpb": 0.8, "aligned_bpb": 0.79}
        lost = {"weight": 0.0, "mass": None, "own_bpb": None, "aligned_bpb": None}
        return {"teachers": {"a": known, "b": lost if 12 < step <= 25 else known}}

    def values(step: int) -> Values:
        return {"teachers_seen": 1 if 12 < step <= 25 else 2}

    folder = write_run(tmp_path / "run", 40, teachers=("a", "b"), changes=changes, more=values)
    path = folder / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    events = [event | (teacher_values(event["step"]) if event["event"] == "step" else {}) for event in events]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    report = make_report(folder)
    page = Page(report.page)
    assert report.summary.teachers["b"].num_lost == 1
    assert "no replica answered for 5 s" in page.text
    assert "b: lost" in page.text
    assert "b: joined" in page.text
    markers = [a for tag, a in page.tags if tag == "path" and (a.get("class") or "").startswith("marker")]
    assert {a["class"] for a in markers} == {"marker teacher_lost", "marker teacher_joined"}
    bpb = re.search(r'aria-label="Teachers on the training text.*?</svg>', report.page, re.DOTALL)
    assert bpb is not None
    solid = re.findall(r'class="c1 line" d="([^"]*)"', bpb[0])
    assert [path.count("M") for path in solid] == [2]  # b's curve has a gap where it was lost


def test_unknown_columns_are_shown(tmp_path: Path) -> None:
    def more(step: int) -> Values:
        return {"divergence": 0.2, "queued_batches": step % 3, "new": {"value": step}, "constant": 7}

    folder = write_run(tmp_path, 30, teachers=("a",), more=more)
    page = page_of(folder)
    assert "Prefetched batches over tokens" in page.figures
    assert "new/value over tokens" in page.figures
    assert "constant 7" in page.text
    assert "divergence" in page.text


def test_domains_and_wait_times_by_teacher_have_charts_if_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 10, teachers=("a",))
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'("held_out_bpb": [\d.]+)', r'\1, "held_out_domains": {"law": 0.9, "code": 0.5}', text)
    path.write_text(
        text.replace('"weight": 1.0', '"weight": 1.0, "wait_s": 0.25, "tokens_per_s": 900.0'), encoding="utf-8"
    )
    page = page_of(folder)
    assert "Held-out bits per byte by domain over tokens" in page.figures
    assert "Wait time by teacher over tokens" in page.figures
    assert "law" in page.text


def test_values_of_the_run_file_are_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><b a="'
    changes = {5: ("teacher_lost", evil, evil)}
    folder = write_run(
        tmp_path / "<i>run</i>",
        10,
        teachers=(evil,),
        changes=changes,
        run={"student": {"model": evil}},
        more=lambda _: {evil: _},
    )
    page = page_of(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, attributes in page.tags if "a" in attributes]
    assert "alert(1)" in page.text


def test_sources_are_shown_without_python_syntax(tmp_path: Path) -> None:
    sources = [{"files": ["a.txt", "b/*.jsonl"], "weight": 0.5, "dataset": None}, {"dataset": "wiki"}]
    text = page_of(write_run(tmp_path, 10, run={"data": {"sources": sources}})).text
    assert "sources files a.txt, b/*.jsonl weight 0.5; dataset wiki" in text
    assert "{'" not in text


@pytest.mark.slow
def test_the_page_of_a_long_run_is_small_and_keeps_its_spike(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path, 20_000, teachers=("a", "b"), more=lambda step: {"grad_norm": 500.0 if step == 7_777 else 1.0}
    )
    page = make_report(folder).page
    assert len(page) < 1_500_000
    paths = re.findall(r' d="([^"]*)"', page)
    assert max(path.count("L") for path in paths) < 2_100  # an area has a top and a bottom
    assert "Lines are means over 400 steps" in page
    norm = re.search(r'aria-label="Gradient norm.*?</svg>', page, re.DOTALL)
    assert norm is not None
    pale = re.search(r'class="c0 pale" d="([^"]*)"', norm[0])
    assert pale is not None
    tops = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", pale[1])]
    assert min(tops) < 50 < 900 < sorted(tops)[1]


def test_without_token_counts_the_x_axis_is_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 10)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"tokens": 100, ', ""), encoding="utf-8")
    page = page_of(folder)
    assert all(label.endswith(" over steps") for label in page.figures)


# --- the command ---


def test_the_command_writes_the_page_and_prints_the_result(runs: Path, tmp_path: Path) -> None:
    result = call("report", runs, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "bits per byte of held-out text" in result.stdout
    assert str(tmp_path / "page.html") in result.stdout
    assert_self_contained((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_command_prints_json(runs: Path) -> None:
    result = call("report", runs, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["run"]["steps"] == printed["comparison"]["baseline"]["steps"] == 6
    assert printed["run"]["held_out"]["before"] == printed["comparison"]["baseline"]["held_out"]["before"]
    assert printed["run"]["teachers"]["t0"]["own_bpb"] > 0
    assert Path(printed["page"]) == runs / "report.html"
    assert Path(printed["page"]).exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
def test_the_page_is_written_to_a_regular_file_only(runs: Path, tmp_path: Path, kind: str) -> None:
    page, other = tmp_path / "report.html", tmp_path / "other.txt"
    other.write_text("unchanged", encoding="utf-8")
    if kind == "link":
        page.symlink_to(other)
    elif kind == "fifo":
        os.mkfifo(page)
    else:
        page = Path("/dev/null")
    assert_one_sentence(call("report", runs, "--out", page), "it is a link or not a regular file; remove it, or give")
    assert page.is_symlink() == (kind == "link")
    assert page.is_char_device() == (kind == "device")
    assert other.read_text(encoding="utf-8") == "unchanged"


def test_the_page_replaces_an_older_page_and_follows_no_link_on_the_way(runs: Path, tmp_path: Path) -> None:
    page, other = tmp_path / "report.html", tmp_path / "other.txt"
    page.write_text("old", encoding="utf-8")
    other.write_text("unchanged", encoding="utf-8")
    (tmp_path / ".partial-report.html").symlink_to(other)
    assert call("report", runs, "--out", page).exit_code == 0
    assert_self_contained(page.read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "report.html"]
    assert other.read_text(encoding="utf-8") == "unchanged"


def test_the_command_reports_errors_in_one_sentence(runs: Path, tmp_path: Path) -> None:
    assert_one_sentence(call("report", tmp_path), "holds no metrics.jsonl: give the folder of a run")
    assert_one_sentence(call("report", runs, "--baseline", "nobody"), "--baseline nobody: found no metrics.jsonl in it")
    assert_one_sentence(call("report", runs, "--out", tmp_path / "no" / "p.html"), "cannot write")
    (tmp_path / "metrics.jsonl").write_text('{"event": "start", "time": 1, "step": 0}\n', encoding="utf-8")
    assert_one_sentence(call("report", tmp_path), "holds no step yet")
