"""A tiny language model in a task of its own, for what the trainer does in meshes.

Run as a module it is ``experiments.main`` with this task among the others:

    python -m tests.experiments.stand_in --task=tests/experiments/stand_in.py --optimizer=...
"""

import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

import precond_optax
from experiments import mesh, tasks
from experiments.tasks import Stream, Task

VOCAB, WIDTH, HIDDEN, LAYERS, LENGTH, EXAMPLES = 24, 8, 16, 3, 4, 64
AXES = {
    'embed': ('vocab', 'embed'),
    'layers': {'up': ('layers', 'embed', 'mlp'), 'down': ('layers', 'mlp', 'embed')},
    'norm': ('features',),
    'odd': ('heads', 'embed'),  # 3 heads: no mesh divides them
}


def get_config():
    return config_dict.ConfigDict(
        dict(
            name='stand_in',
            batch_size=16,
            epochs=3,  # of four steps
            seed=0,
            log_every=1,
            checkpoint_every_steps=2,
            evaluate_every_steps=4,
            max_consecutive_errors=2,
            max_to_keep=1,
            accumulation=1,
            slow=0.0,  # seconds that a batch takes
        )
    )


def make_task(config, data_dir):
    index, count = mesh.reader(config)
    size, per_epoch = config['batch_size'], EXAMPLES // config['batch_size']
    tokens = np.random.default_rng(0).integers(0, VOCAB, (EXAMPLES, LENGTH + 1)).astype(np.int32)

    def init(key):
        sizes = {'embed': (VOCAB, WIDTH), 'up': (LAYERS, WIDTH, HIDDEN), 'odd': (3, WIDTH)}
        sizes['down'] = (LAYERS, HIDDEN, WIDTH)
        numbers = jax.random.normal(key, (2048,))  # one draw: compiling several takes seconds
        embed, up, odd, down = (numbers[: math.prod(s)].reshape(s) for s in sizes.values())
        layers = {'up': up / 3, 'down': down[:, ::-1] / 4}
        return {'embed': embed, 'layers': layers, 'norm': jnp.ones(WIDTH), 'odd': odd}

    def logits(params, words):
        # The rows that are looked up are not cut along 'embed', which divides the batch too.
        table = mesh.constrain(params['embed'], ('vocab', 'features'))
        x = mesh.constrain(table[words], ('batch', 'length', 'features'))

        def layer(x, own):
            hidden = mesh.constrain(jnp.tanh(x @ own['up']), ('batch', 'length', 'mlp'))
            return mesh.constrain(x + hidden @ own['down'], ('batch', 'length', 'features')), None

        x, _ = jax.lax.scan(layer, x, params['layers'])
        x = x * params['norm'] + jnp.mean(params['odd'], axis=0)
        return mesh.constrain(x @ params['embed'].T, ('batch', 'length', 'vocab'))

    def loss(params, batch):
        words, targets = batch['tokens'][:, :-1], batch['tokens'][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, words), targets)
        return jnp.mean(losses)

    def batches(step):
        share = size // count
        if index == 1 and os.environ.get('STAND_IN_SIGTERM'):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # until the others have been told
        while True:
            epoch, place = divmod(step, per_epoch)
            order = np.random.default_rng(epoch).permutation(EXAMPLES)
            rows = order[place * size :][index * share : (index + 1) * share]
            time.sleep(config['slow'])
            yield {'tokens': tokens[rows], 'step': np.array(step, np.int32)}
            step += 1

    shape = {
        'tokens': jax.ShapeDtypeStruct((size // count, LENGTH + 1), np.int32),
        'step': jax.ShapeDtypeStruct((), np.int32),
    }
    whole = jax.jit(lambda params: {'train_loss': loss(params, {'tokens': tokens})})
    return Task(
        batch_size=size,
        epochs=config['epochs'],
        init=init,
        loss=loss,
        schedule=lambda peak, anneal=True: lambda step: peak * jnp.minimum(1.0, (step + 1) / 3),
        evaluate=whole,
        stream=Stream(EXAMPLES, per_epoch, (shape,), batches),
        validate=whole,
        tracked='train_loss',
        layout={'^layers/': precond_optax.LeafRule(batch_axes=1)},
        logical_axes=AXES,
        tokens_per_step=size * LENGTH,
        flops_per_token=1e3,
        artifacts={'tokenizer.model': b'its letters'},
    )


def register():
    """Makes the task known by its name."""
    tasks._MODULES['stand_in'] = 'tests.experiments.stand_in'


if __name__ == '__main__':
    from experiments import main

    register()
    main.run(main.main, 'task', 'optimizer', 'workdir')
