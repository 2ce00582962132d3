"""The gradients of some kernels over some steps of training, for programs that look into them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags

from experiments import optimizers, program, segments, tasks, workdir

_LAYERS = flags.DEFINE_list('layers', ['dense_0', 'dense_2', 'dense_3', 'dense_6'], 'Which ones.')
_WARMUP = flags.DEFINE_integer('warmup', 100, 'Steps before the first that counts.', lower_bound=0)
_STEPS = flags.DEFINE_integer('steps', 200, 'Steps that count.', lower_bound=1)


def collect(
    task: tasks.Task,
    optimizer: Mapping[str, Any],
    layers: Sequence[str],
    *,
    warmup: int,
    steps: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The kernels' gradients (steps, inputs, outputs) after the warm-up, and all steps' losses."""

    def kernels(tree: Any) -> dict[str, jax.Array]:
        return {layer: tree[layer]['kernel'] for layer in layers}

    # Its state is the last gradient.
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, kernels(params)),
        lambda updates, state, params=None: (updates, kernels(updates)),
    )
    tx = optax.chain(record, optimizers.make(optimizer, optax.constant_schedule, warmup + steps))
    params = task.init(jax.random.fold_in(jax.random.key(seed), 0))
    if unknown := [layer for layer in layers if layer not in params]:
        raise ValueError(f'--layers: {unknown} not among {sorted(params)}.')
    carry = program.Carry(params, tx.init(params), jnp.zeros([], jnp.int32))
    segment = segments.make_segment(task, program.make_step(task, tx), seed)
    kept = {k: np.empty((steps, *x.shape), np.float32) for k, x in kernels(params).items()}
    losses = []
    if warmup:
        carry, first = segment(carry, task.train_data, warmup)
        losses += np.asarray(first['loss']).tolist()
    for step in tqdm.trange(steps, unit='step'):
        carry, told = segment(carry, task.train_data, 1)
        losses += np.asarray(told['loss']).tolist()
        for layer, array in kept.items():
            array[step] = carry.opt_state[0][layer]
    return kept, losses


def of_flags() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The gradients that the flags ask for, and what they are of, for a JSON file."""
    flag = flags.FLAGS
    settings = {'warmup': _WARMUP.value, 'steps': _STEPS.value}
    task = tasks.make(flag.task, flag.data_dir)
    grads, losses = collect(task, flag.optimizer, _LAYERS.value, **settings, seed=flag.task.seed)
    about = {'task': workdir.plain(flag.task), 'optimizer': workdir.plain(flag.optimizer)}
    return grads, {**about, **settings, 'losses': losses}


def describe(about: Mapping[str, Any]) -> str:
    """A line on the run, for below a table."""
    first, last = (np.mean(part) for part in np.array_split(about['losses'][-about['steps'] :], 2))
    return (
        f'{about["steps"]} steps after {about["warmup"]} with {about["optimizer"]["name"]}; '
        f'mean loss {first:.2f} over the first half of them, {last:.2f} over the second'
    )
