"""`python -m tests.trainer.rank_main RUN.json [--resume] [--stop-at=N] [--pause=SECONDS]`: a rank of a test's run.

A pause after every step gives a test the time to kill it in the middle of its run.
"""

import sys
import time
from pathlib import Path

from trainer.config import RunConfig
from trainer.loop import train


def main(path: str, *more: str) -> None:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in more)
    config = RunConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
    pause = float(given.get("pause", 0))
    stop_at = int(given["stop-at"]) if "stop-at" in given else None
    train(config, resume="resume" in given, stop_at=stop_at, listener=lambda _: time.sleep(pause))


if __name__ == "__main__":
    main(*sys.argv[1:])
