"""Libraries and commands that are not installed everywhere."""

import os
import shutil
from importlib.util import find_spec

import pytest


def need(module: str) -> None:
    """Skip with the reason where a library is not installed; in CI that is a failure."""
    if find_spec(module) is None:
        _without(module)


def need_command(name: str) -> None:
    """The same of a command."""
    if shutil.which(name) is None:
        _without(name)


def _without(what: str) -> None:
    reason = f"{what} is not installed here"
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
