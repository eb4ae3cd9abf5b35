"""Libraries that are not installed everywhere."""

import os
from importlib.util import find_spec

import pytest


def need(module: str) -> None:
    """Skip with the reason where a library is not installed; in CI that is a failure."""
    if find_spec(module) is None:
        reason = f"{module} is not installed here"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
