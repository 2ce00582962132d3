"""Which of many cases the quick suite takes: the others are slow tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.cases import Case


def rows(cases: Iterable[Case], only: Collection[str] = ()) -> list[Any]:
    """The rows by name, slow but for ``only`` these, or for variants and Sketchy if none is named.

    Sketchy's trees are Shampoo's.
    """

    def is_slow(case: Case) -> bool:
        return case.name not in only if only else case.variant or case.name == 'sketchy'

    return [
        pytest.param(case, marks=pytest.mark.slow if is_slow(case) else (), id=case.name)
        for case in cases
    ]


def every(n: int, cases: Iterable[Any], first: int = 0) -> list[Any]:
    """The cases, of one argument or of a tuple, all slow but every n-th from ``first`` on."""

    def slow(case: Any) -> Any:
        arguments = case if isinstance(case, tuple) else (case,)
        return pytest.param(*arguments, marks=pytest.mark.slow)

    return [case if i % n == first else slow(case) for i, case in enumerate(cases)]
