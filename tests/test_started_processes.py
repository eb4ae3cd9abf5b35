"""Processes that tests start: all of them end."""

import subprocess

import psutil
import pytest

from tests.processes import started


def test_a_descendant_that_has_ended_does_not_keep_the_others_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = psutil.Popen(["true"], stdout=subprocess.DEVNULL)
    finished.wait(10)
    with started(["sh", "-c", "sleep 60 & echo; wait"]) as process:
        while not (children := process.children()):
            pass
        monkeypatch.setattr(psutil.Popen, "children", lambda *_, **__: [finished, *children])
    assert not process.is_running()
    assert psutil.wait_procs(children, timeout=10)[1] == []
