"""What is said of a run: its metrics on the way, its summary at the end."""

from typing import Any

import jax

from experiments import optimizers, program, tasks
from experiments import workdir as workdir_lib


def summary(task: tasks.Task, carry: program.Carry, seconds: float) -> dict[str, Any]:
    """What is said of a run that is through."""
    described = task.describe(_evaluated(carry)) if task.describe else {}
    return {
        **numbers(task.evaluate, carry),
        **described,
        'steps': task.num_steps,
        'seconds': seconds,
        'steps_per_second': task.num_steps / seconds,
        'num_params': sum(x.size for x in jax.tree.leaves(carry.params)),
        # Without the counters of the wrapper.
        'state_bytes': sum(x.nbytes for x in jax.tree.leaves(carry.opt_state.inner_state)),
        'notfinite': int(carry.opt_state.total_notfinite),
    }


def _evaluated(carry: program.Carry) -> Any:
    return optimizers.evaluated(carry.opt_state, carry.params)


def numbers(evaluate: Any, carry: program.Carry) -> dict[str, float]:
    """What a function of a task says of a run's parameters."""
    return {name: float(value) for name, value in evaluate(_evaluated(carry)).items()}


def best(task: tasks.Task, run: workdir_lib.Workdir, carry: program.Carry) -> dict[str, Any]:
    """The best that was logged of what a task tracks, its step, and what was logged with it.

    From the log, which a resumed run has cut to its checkpoint: so a checkpoint holds none of it.
    """
    rows = [row for row in workdir_lib.read_metrics(run.path) if row.get(task.tracked) is not None]
    if task.validate is None or not rows:
        return {}
    row = max(rows, key=lambda row: row[task.tracked])  # the first of equal ones
    split = task.tracked.split('_')[0]
    names = jax.eval_shape(task.validate, carry.params)
    return {
        f'best_{task.tracked}': row[task.tracked],
        f'best_{split}_step': row['step'],
        f'at_best_{split}': {name: row[name] for name in names},
    }
