"""Train one rank of a test's run.

Usage: `python -m tests.trainer.run_rank RUN.json [--resume] [--stop-at=N] [--pause=SECONDS]`. A pause after every step
gives a test the time to kill the process in the middle of its run.
"""

import sys
import time
from pathlib import Path

from trainer.config import RunConfig
from trainer.training.loop import train


def main(path: str, *arguments: str) -> None:
    """Parse the options and train the run file, a RunConfig as JSON."""
    options = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    config = RunConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
    pause_s = float(options.get("pause", 0))
    stop_at = int(options["stop-at"]) if "stop-at" in options else None
    train(config, resume="resume" in options, stop_at=stop_at, listener=lambda _: time.sleep(pause_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
