"""`tutelage report`: one page that needs nothing else, from real runs and from broken ones."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.trainer.made_runs import Values, write_run
from tests.trainer.runs import run_config, served_models, write_corpus
from tests.trainer.test_cli import assert_one_sentence, call
from trainer.loop import train
from trainer.reports.report import make_report

VOID = ("meta", "link", "img", "br", "hr", "input", "path")


class Page(HTMLParser):
    """A parsed page: its texts, its tags with their attributes; refuses tags that are not closed in order."""

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
        """Titles, as the curves' labels have them."""
        return [str(attributes["aria-label"]) for tag, attributes in self.tags if tag == "svg"]


def page_of(folder: Path, twin: Path | None = None) -> Page:
    return Page(make_report(folder, twin).page)


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
def arms(tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path, tiny_sentencepiece: Path) -> Path:
    """A real run with two teachers and its twin without, laid out as the demo does."""
    folder = tmp_path_factory.mktemp("arms")
    corpus = write_corpus(folder)
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        train(run_config(tiny_byte_level, corpus, folder / "fused", urls, eval={"every_steps": 2}))
    train(run_config(tiny_byte_level, corpus, folder / "twin", [], eval={"every_steps": 2}))
    return folder


def test_a_fused_run_is_shown_beside_its_twin(arms: Path) -> None:
    report = make_report(arms)
    assert_self_contained(report.page)
    page = Page(report.page)
    assert report.comparison is not None
    assert report.comparison.same_start
    assert not report.comparison.differs_in
    assert report.summary.finished
    assert report.result in page.text
    assert "twin without teachers has" in report.result
    assert report.summary.teachers.keys() == {"t0", "t1"}
    for title in ("Held-out bits per byte", "Training loss", "Share of each teacher", "Time per step", "Throughput"):
        assert any(label.startswith(title) for label in page.figures), title
    assert all(label.endswith(" over tokens") for label in page.figures)
    for words in (
        "student",
        "twin",
        "twin's cross-entropy",
        "divergence",
        "window_tokens 60",
        "method mean",
        "12 to train on",
    ):
        assert words in page.text, words


def test_every_way_to_name_the_twin_gives_the_same_page(arms: Path) -> None:
    whole = make_report(arms).page
    assert make_report(arms / "fused").page == whole
    assert make_report(arms / "fused", Path("twin")).page == whole
    assert make_report(arms / "fused", arms / "twin").page == whole


def test_a_plain_run_has_no_teachers_and_shows_none(arms: Path) -> None:
    report = make_report(arms / "twin")
    page = Page(report.page)
    assert report.comparison is None
    assert not report.summary.teachers
    assert not [label for label in page.figures if "eacher" in label or "mass" in label]
    assert "times lost" not in page.text
    assert "What the teachers said" not in page.text
    assert "divergence" not in page.texts  # the name of a line; the run file says it too
    assert "twin:" not in page.text


def test_a_run_that_stopped_in_the_middle_of_a_line_is_reported_up_to_there(arms: Path, tmp_path: Path) -> None:
    whole = (arms / "fused" / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[: whole.index(b'"step": 5') + 40])
    report = make_report(tmp_path)
    assert (report.summary.steps, report.summary.planned_steps, report.summary.finished) == (4, 6, False)
    assert "not complete" in Page(report.page).text
    assert "4 steps" in report.result
    assert "of 6 planned" in report.result


def test_lost_teachers_are_marked_on_the_curves_and_listed(tmp_path: Path) -> None:
    happens = {
        12: ("teacher_lost", "b", "no replica answered for 5 s"),
        25: ("teacher_joined", "b", "http://127.0.0.1:9 answers again"),
    }

    def absent(step: int) -> Values:
        known = {"share": 0.5, "mass": 0.9, "own_bpb": 0.8, "aligned_bpb": 0.79}
        gone = {"share": 0.0, "mass": None, "own_bpb": None, "aligned_bpb": None}
        return {"teachers": {"a": known, "b": gone if 12 < step <= 25 else known}}

    def values(step: int) -> Values:
        return {"teachers_seen": 1 if 12 < step <= 25 else 2}

    folder = write_run(tmp_path / "run", 40, teachers=("a", "b"), happens=happens, more=values)
    path = folder / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    events = [event | (absent(event["step"]) if event["event"] == "step" else {}) for event in events]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    report = make_report(folder)
    page = Page(report.page)
    assert report.summary.teachers["b"].num_lost == 1
    assert "no replica answered for 5 s" in page.text
    assert "b: lost" in page.text
    assert "b: joined" in page.text
    marks = [a for tag, a in page.tags if tag == "path" and (a.get("class") or "").startswith("mark")]
    assert {a["class"] for a in marks} == {"mark teacher_lost", "mark teacher_joined"}
    bpb = re.search(r'aria-label="Teachers on the training text.*?</svg>', report.page, re.DOTALL)
    assert bpb is not None
    solid = re.findall(r'class="c1 line" d="([^"]*)"', bpb[0])
    assert [path.count("M") for path in solid] == [2]  # b's curve has a gap where it was lost


def test_keys_that_nobody_knows_yet_are_there(tmp_path: Path) -> None:
    def more(step: int) -> Values:
        return {"divergence": 0.2, "queued_batches": step % 3, "novel": {"figure": step}, "steady": 7}

    folder = write_run(tmp_path, 30, teachers=("a",), more=more)
    page = page_of(folder)
    assert "Batches ready ahead over tokens" in page.figures
    assert "novel/figure over tokens" in page.figures
    assert "steady 7" in page.text
    assert "divergence" in page.text


def test_domains_and_waiting_for_each_teacher_have_figures_where_they_are_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 10, teachers=("a",))
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'("held_out_bpb": [\d.]+)', r'\1, "held_out_domains": {"law": 0.9, "code": 0.5}', text)
    path.write_text(
        text.replace('"share": 1.0', '"share": 1.0, "waited_s": 0.25, "tokens_per_s": 900.0'), encoding="utf-8"
    )
    page = page_of(folder)
    assert "Held-out bits per byte by domain over tokens" in page.figures
    assert "Waited for each teacher over tokens" in page.figures
    assert "law" in page.text


def test_what_a_run_file_says_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><b a="'
    happens = {5: ("teacher_lost", evil, evil)}
    folder = write_run(
        tmp_path / "<i>run</i>",
        10,
        teachers=(evil,),
        happens=happens,
        run={"student": {"model": evil}},
        more=lambda _: {evil: _},
    )
    page = page_of(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, attributes in page.tags if "a" in attributes]
    assert "alert(1)" in page.text


def test_sources_are_told_as_a_person_would_write_them(tmp_path: Path) -> None:
    sources = [{"files": ["a.txt", "b/*.jsonl"], "weight": 0.5, "dataset": None}, {"dataset": "wiki"}]
    text = page_of(write_run(tmp_path, 10, run={"data": {"sources": sources}})).text
    assert "sources files a.txt, b/*.jsonl weight 0.5; dataset wiki" in text
    assert "{'" not in text


def test_a_long_run_is_a_page_of_bounded_size_with_its_spike(tmp_path: Path) -> None:
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


def test_without_tokens_curves_run_along_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 10)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"tokens": 100, ', ""), encoding="utf-8")
    page = page_of(folder)
    assert all(label.endswith(" over steps") for label in page.figures)


# --- the command ---


def test_the_command_writes_the_page_and_says_the_result(arms: Path, tmp_path: Path) -> None:
    result = call("report", arms, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "bits per byte of held-out text" in result.stdout
    assert str(tmp_path / "page.html") in result.stdout
    assert_self_contained((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_command_prints_figures_for_machines(arms: Path) -> None:
    result = call("report", arms, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["run"]["steps"] == printed["comparison"]["twin"]["steps"] == 6
    assert printed["run"]["held_out"]["before"] == printed["comparison"]["twin"]["held_out"]["before"]
    assert printed["run"]["teachers"]["t0"]["own_bpb"] > 0
    assert Path(printed["page"]) == arms / "report.html"
    assert Path(printed["page"]).exists()


def test_the_command_refuses_in_one_sentence(arms: Path, tmp_path: Path) -> None:
    assert_one_sentence(call("report", tmp_path), "holds no metrics.jsonl: give the folder of a run")
    assert_one_sentence(call("report", arms, "--twin", "nobody"), "--twin nobody: there is no metrics.jsonl in it")
    assert_one_sentence(call("report", arms, "--out", tmp_path / "no" / "p.html"), "cannot write")
    (tmp_path / "metrics.jsonl").write_text('{"event": "start", "time": 1, "step": 0}\n', encoding="utf-8")
    assert_one_sentence(call("report", tmp_path), "holds no step yet")
