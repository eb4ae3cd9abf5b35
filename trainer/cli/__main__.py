"""Entry point of `tutelage`. Importing this module registers all commands, one file per command."""

from trainer.cli import align, demo, doctor, evaluate, preview, report, serve, serve_ray, train
from trainer.cli.app import app

__all__ = ["align", "app", "demo", "doctor", "evaluate", "preview", "report", "serve", "serve_ray", "train"]

if __name__ == "__main__":
    app()
