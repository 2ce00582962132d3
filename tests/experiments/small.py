"""What the tests of the drivers share: configs, shrunk tasks, logs."""

import importlib
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
TASKS = sorted(f.stem for f in (ROOT / 'configs/tasks').glob('[a-z]*.py'))
OPTIMIZERS = sorted(f.stem for f in (ROOT / 'configs/optimizers').glob('[a-z]*.py'))


def config_of(kind, name):
    return importlib.import_module(f'configs.{kind}.{name}').get_config()


# fmt: off
SMALL = {
    'autoencoder': dict(hidden=(8, 3, 8)),
    'language_model': dict(
        layers=1, width=8, heads=2, kv_heads=1, mlp=16, vocab_size=264, length=8, steps=4,
        warmup_steps=1, checkpoint_every_steps=2, evaluate_every_steps=2, evaluate_batches=2,
        compute_dtype='float32',
    ),
    'pos_tagging': dict(
        layers=1, width=8, heads=2, qkv=8, mlp=16, buckets=(8,), evaluate_every_epochs=1
    ),
}
# fmt: on


def small_task(config='autoencoder', **changes):
    """A task's config shrunk to eight steps on synthetic data."""
    task = config_of('tasks', config)
    task.update(source='synthetic', batch_size=64, log_every=1)
    if 'epochs' in task:
        task.update(epochs=2, warmup_epochs=1)
    task.update(SMALL[task.name])
    task.update(changes)
    return task


def for_few_steps(config):
    """An optimizer's config with what a run of many steps does later done in the first ones."""
    if 'start_step' in config:
        config.update(start_step=1, update_every=2)
    return config


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def without_clock(rows):
    clocked = ('second', 'mfu', 'optimizer_share')
    return [{k: v for k, v in row.items() if not any(c in k for c in clocked)} for row in rows]
