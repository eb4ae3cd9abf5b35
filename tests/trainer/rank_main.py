"""`python -m tests.trainer.rank_main RUN.json [--resume] [--stop-at=N]`: what each process of a test of ranks runs."""

import sys
from pathlib import Path

from trainer.config import RunConfig
from trainer.loop import train


def main(path: str, *more: str) -> None:
    stops = [int(word.partition("=")[2]) for word in more if word.startswith("--stop-at=")]
    config = RunConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
    train(config, resume="--resume" in more, stop_at=stops[0] if stops else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
