"""One process of a tiny run: `python -m tests.trainer.rank_main RANK SIZE PORT WHAT`, with the errors of the commands.

WHAT is `fail` (an error of a user in rank 1 while rank 0 waits) or `alone` (the other processes never start).
"""

import os
import sys
import time

import typer

import trainer.peers as peers
from trainer.cli.app import one_sentence_errors
from trainer.distributed import process_group
from trainer.errors import DataError


def main(rank: str, size: str, port: str, what: str) -> None:
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if what == "alone":
        peers.RENDEZVOUS_S, peers.RENDEZVOUS_REPORT_S = 4.0, 0.5
    peers.REPORT_S = 0.5
    with one_sentence_errors(), process_group("cpu") as ranks:
        ranks.wait()
        if not ranks.first:
            time.sleep(1.5)
            raise DataError("line 7 is not JSON")
        ranks.wait()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
