"""SIGTERM: the run finishes its segment, saves and ends with exit code 143."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # what a shell says of a process that it ended


class Preemption:
    """Within it, a SIGTERM is a request to stop at the end of a segment.

    Of several processes any may get it. JAX's preemption service, which
    ``jax.distributed.initialize`` starts, tells the others and agrees with them on a step that
    none has passed.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def __enter__(self) -> 'Preemption':
        # JAX has a handler of its own where it is distributed; elsewhere only the main thread may.
        main = threading.current_thread() is threading.main_thread()
        self._own = main and not jax.distributed.is_initialized()
        if self._own:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self._requested = True

    def __exit__(self, *_: Any) -> None:
        if self._own:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, begin: int, end: int) -> bool:
        """Whether to stop, after the steps from ``begin`` to ``end``; the same in all processes.

        They agree on a number of steps taken, so each must be asked for, in turn.
        """
        if not jax.distributed.is_initialized():
            return self._requested
        taken = range(begin + 1, end + 1)
        return any([multihost_utils.reached_preemption_sync_point(step) for step in taken])
