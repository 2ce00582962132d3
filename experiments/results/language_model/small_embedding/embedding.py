"""What the embedding of the language model `small` gets, beside what the other leaves get: 40 steps.

PYTHONPATH=. python experiments/results/language_model/small_embedding/embedding.py DATA
"""

import sys

import jax
import optax

import precond_optax
from configs.tasks import language_model as config
from experiments import program, segments, tasks, telemetry
from experiments.tasks import language_model as task_lib
from precond_optax import grafting

B1, B2 = 0.9478, 0.9448  # with the rate, what a search found for the shared basis


def main(data_dir: str) -> None:
    task_config = config.get_config('small')
    task_config.update(
        remat='dots', batch_size=4, steps=100, warmup_steps=10, files=('text/books/*.txt',)
    )
    task = tasks.make(task_config, data_dir)
    rate = task.schedule(1.4e-3)
    adam = optax.adam(rate, B1, B2)
    by_norm = precond_optax.shared_basis(
        rate, B1, B2, 1e-9, rank=8, update_every=10, layout=task_lib.LAYOUT, fallback='sgd'
    )
    by_rule = optax.chain(
        grafting.scale_by_normalized_rms(B2),
        optax.ema(B1),
        optax.scale_by_learning_rate(rate),
    )
    tried = {
        'embedding Adam, others shared basis': (adam, by_norm),
        "embedding SGD with RMSProp's norm, others Adam": (by_norm, adam),
        'embedding RMSProp, others Adam': (by_rule, adam),
    }
    for name, (embedding, others) in tried.items():
        tx = optax.multi_transform(
            {'embedding': embedding, 'others': others},
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: (
                    'embedding' if 'embedding' in jax.tree_util.keystr(path) else 'others'
                ),
                params,
            ),
        )
        tx = optax.apply_if_finite(tx, 5)
        carry = program.initial(task, tx, 0)
        taking = segments.make(task, program.make_step(task, tx), 0)
        taking.compile(carry, [5])
        for at in range(0, 40, 5):
            carry, log, *_ = taking(carry, at, 5, telemetry.Watch())
            print(f'{name}, steps {at + 1} to {at + 5}:', *(f'{x:.2f}' for x in log['loss']))


if __name__ == '__main__':
    main(sys.argv[1])
