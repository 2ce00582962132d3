"""Which of many cases the quick suite takes: the others are slow tests."""

from collections.abc import Sequence
from typing import Any

import pytest


def every(n: int, cases: Sequence[tuple[Any, ...]], first: int = 0) -> list[Any]:
    """The cases, all slow but every n-th from ``first`` on."""
    return [
        case if i % n == first else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]
