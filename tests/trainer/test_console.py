"""Progress lines of a run."""

import io
import os
import subprocess
import sys
from typing import Any

import pytest

from trainer.cli import console
from trainer.cli.console import duration, progress_listener
from trainer.cli.streams import LossyStream


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "REFRESH_S", -1.0)


def start(steps: int, step: int = 0, **more: Any) -> dict[str, Any]:
    return {"event": "start", "step": step, "steps": steps, "samples": 40, **more}


def step_record(step: int, step_s: float = 1.0, wait_s: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": step,
        "loss": 2.5,
        "tokens_per_s": 900.0,
        "step_s": step_s,
        "wait_s": wait_s,
        "skipped": 0,
        "tokens": 900,
        **more,
    }


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_step_line_shows_loss_speed_wait_weights_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_listener("training")
    show(start(100))
    teachers = {"a": {"weight": 0.75, "wait_s": 0.5}, "b": {"weight": 0.25, "wait_s": 1.5}}
    show(step_record(1, step_s=1.0, wait_s=2.0, teachers=teachers))
    assert lines(capsys)[-1] == (
        "step    1/100  loss 2.5000    900 tokens/s  waited 2.0 s (1.5 s for b)  a 75%  b 25%  5 min left"
    )


def test_the_time_left_is_the_median_of_recent_steps_times_the_remaining_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = progress_listener("training")
    show(start(1000))
    for step, step_s in enumerate([500.0, 1.0, 2.0], 1):  # the first step compiles kernels
        show(step_record(step, step_s=step_s, wait_s=0.5))
    assert lines(capsys)[-1].endswith("  42 min left")  # 997 steps of 2.5 s
    for step in range(4, 4 + console.RECENT_STEPS):
        show(step_record(step, step_s=0.1, wait_s=0.1))
    assert lines(capsys)[-1].endswith("  3 min left")  # 947 steps of 0.2 s: older steps do not count


def test_the_last_step_has_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_listener("training")
    show(start(2))
    for step in (1, 2):
        show(step_record(step))
    before, last = lines(capsys)[-2:]
    assert before.endswith("1 s left")
    assert "left" not in last


def test_the_last_lines_count_what_was_shortened_dropped_and_changed(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_listener("training")
    show(start(2))
    for step in (1, 2):
        show(step_record(step, shortened=1, omitted_reasoning=3, changed_content=0, folded_system=0))
    show({"event": "end", "step": 2, "model": "m"})
    assert lines(capsys)[-3:] == [
        "2 samples shortened since this start",
        "6 messages whose reasoning the student's chat template omits since this start",
        "student exported to m",
    ]


def test_a_resumed_run_counts_only_the_remaining_steps(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_listener("training")
    show(start(100, step=90))
    show(step_record(91))
    assert lines(capsys)[-1].endswith("9 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (190, "3 min"),
        (3569, "59 min"),
        (3580, "1.0 h"),
        (9000, "2.5 h"),
        (4 * 86_400, "4.0 days"),
    ],
)
def test_a_duration_is_shown_in_its_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_value_that_is_not_finite_is_shown_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    progress_listener("training")({"event": "eval", "step": 3, "held_out_bpb": None})
    assert lines(capsys)[-1] == "held-out text after step 3: – bits per byte"


def test_invalid_records_and_changed_settings_are_listed_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    source = {"name": "corpus", "format": "chats: column messages", "empty": 1, "invalid": 2}
    source |= {"first_invalid": ["line 3: no object", "line 9: no text"]}
    progress_listener("training")(
        start(10, sources=[source], changed={"optim.lr": [0.1, 0.2], "train.steps": [6, None]})
    )
    *_, kind, empty, invalid, changed, removed = lines(capsys)
    assert kind == "corpus: chats: column messages"
    assert empty == "corpus: 1 empty records are left out"
    assert invalid == "corpus: 2 invalid records are skipped (line 3: no object; line 9: no text)"
    assert changed == "changed since the previous start: optim.lr 0.1 → 0.2"
    assert removed == "changed since the previous start: train.steps 6 → not set"


def test_names_that_look_like_markup_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_listener("[/red]")
    source = {"name": "[/x]", "format": "texts: column [/t]", "empty": 0, "invalid": 1}
    source |= {"first_invalid": ["[bold]\x1b[31m"], "repeated": ["[/a] is [b"]}
    show(start(2, sources=[source], changed={"[/k]": ["[/old]", ":smile:"]}))
    show(step_record(1, teachers={"[/red]": {"weight": 1.0, "wait_s": 1.0}}))
    show({"event": "end", "step": 2, "model": "out/[/red]/model"})
    console.show_evaluation({"held_out_bpb": 1.0, "held_out_domains": {"[/x]": 1.0}}, {"[/task]": {"[m]": 1.0}})
    printed = capsys.readouterr().err
    for text in (
        "[/x]: texts: column [/t]",
        "[/x]: 1 invalid",
        r"[bold]\x1b[31m",
        "[/a] is [b",
        "[/k] [/old] → :smile:",
        "[/red] 100%",
        "out/[/red]/model",
    ):
        assert text in printed
    assert "[/task]" in printed


class ClosedPipe(io.StringIO):
    """A stream whose reader closes the pipe after one line."""

    def write(self, text: str) -> int:
        if self.tell():
            raise BrokenPipeError
        return super().write(text)


def test_output_is_dropped_after_the_first_write_that_fails() -> None:
    broken = ClosedPipe()
    stream = LossyStream(broken)
    for line in ("one\n", "two\n", "three\n"):
        assert stream.write(line) == len(line)
    stream.flush()
    assert stream.lost
    assert broken.getvalue() == "one\n"
    assert not LossyStream(io.StringIO()).lost


STREAMS = """
import os, sys
number, how = int(sys.argv[1]), sys.argv[2]
if how == "closed":
    os.close(number)
elif how == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
else:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, number)
from trainer.cli.streams import guard_streams, output_is_lost
guard_streams()
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, "\\udcff \\u540d", file=stream, flush=True)
os.write(number, b"from a library")
sys.exit(5 if output_is_lost() else 4)
"""


@pytest.mark.parametrize("how", ["closed", "full", "pipe"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_process_survives_the_loss_of_its_output(number: int, how: str) -> None:
    command = [sys.executable, "-c", STREAMS, str(number), how]
    ended = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C"}, check=False, timeout=60)
    assert ended.returncode == (4 if how == "closed" else 5)
    assert b"Error" not in ended.stdout + ended.stderr
