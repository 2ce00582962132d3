"""The language model's layout for the optimizers and its partition over devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import precond_optax
from configs.tasks import language_model as config
from experiments import mesh, optimizers
from experiments.tasks import language_model as task
from experiments.tasks.language_model import loss, model
from tests import compiled
from tests.experiments.small import ROOT, config_of


def of(name, **changes):
    return dataclasses.replace(task.sizes(config.get_config(name)), **changes)


def test_lines_for_launching_cut_no_head():
    """Of the largest size: a tensor axis that does not divide the heads leaves them whole."""
    text = (ROOT / 'experiments/LAUNCH.md').read_text()
    parts = {int(number) for number in re.findall(r'--mesh=\S*,(\d+)', text)}
    assert parts >= {1, 4}
    assert all(of('1b').heads % number == of('1b').kv_heads % number == 0 for number in parts)


# Layout.

FIRST_ORDER = {
    'sonew': ('Adam direction',) * 2,
    'shared_basis': ('SGD direction', 'grafting direction'),
    'mbag': ('AdaGrad direction',) * 2,
    'block_adam': ('Adam direction',) * 2,
    'shampoo': ('grafting direction',) * 2,
    'sketchy': ('grafting direction',) * 2,
}


def plan_of(name, sizes):
    layout = optimizers.make(config_of('optimizers', name), lambda p: p, 10, task.LAYOUT)
    plan = precond_optax.plan(layout, model.shapes(sizes))
    return plan, {leaf.path: leaf for leaf in plan.leaves}


@pytest.mark.parametrize('name', FIRST_ORDER)
def test_plan_of_a_billion_parameters(name):
    """32 matrices in each kernel, by default; the vocabulary and the scales get none."""
    plan, leaves = plan_of(name, of('1b'))
    assert not plan.unmatched_rules
    kernels = {path for path, leaf in leaves.items() if len(leaf.shape) > 2}
    assert len(kernels) == 7
    for path, leaf in leaves.items():
        if path in kernels:
            assert 'direction' not in leaf.treatment
            assert '-D after 1 batch axes' in leaf.reason or 'seen as 1536x1536' in leaf.reason
            assert ('seen as' in leaf.reason) == ('attention' in path)
        else:
            vocabulary = path in ('embedding', 'output')
            assert leaf.treatment == FIRST_ORDER[name][0 if vocabulary else 1]
            assert vocabulary or leaf.reason.startswith('1-D')
    if name == 'sonew':
        assert leaves['layers/mlp/up'].treatment.startswith('tridiagonal, 32 x 6291456')


def test_soaa_has_no_layout():
    """It is diagonal: all leaves are treated alike."""
    _, leaves = plan_of('soaa', of('1b'))
    assert {leaf.treatment for leaf in leaves.values()} == {'SOAA, diagonal, uncentered'}


def test_muon_orthogonalises_each_layer(rng):
    """Optax's Muon by itself takes leaves of two axes only; Adam moves the other leaves."""
    shapes = {
        'layers': {
            'attention': {'query': (2, 6, 2, 2), 'out': (2, 2, 2, 6)},
            'mlp': {'up': (2, 6, 4)},
            'scale': (2, 6),
        },
        'embedding': (5, 6),
    }
    matrices = {'query': (6, 4), 'out': (4, 6), 'up': (6, 4)}
    grads = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )

    def updates(layout, grads):
        tx = optimizers.make(config_of('optimizers', 'muon'), lambda p: p, 10, layout)
        return jax.jit(tx.update)(grads, tx.init(grads), grads)[0]

    found = updates(task.LAYOUT, grads)
    attention = found['layers']['attention']
    of_layers = attention | {'up': found['layers']['mlp']['up']}
    layers = grads['layers']['attention'] | {'up': grads['layers']['mlp']['up']}
    for name, shape in matrices.items():
        for layer in range(2):
            alone = updates(None, {'kernel': layers[name][layer].reshape(shape)})['kernel']
            np.testing.assert_allclose(
                of_layers[name][layer].reshape(shape), alone, rtol=1e-4, atol=1e-7
            )
    adam = optimizers.make(config_of('optimizers', 'muon'), lambda p: p, 10)
    others = {'scale': grads['layers']['scale'][0], 'embedding': grads['embedding'].ravel()}
    expected = jax.jit(adam.update)(others, adam.init(others), others)[0]
    np.testing.assert_allclose(found['layers']['scale'][0], expected['scale'], rtol=1e-5)
    np.testing.assert_allclose(found['embedding'].ravel(), expected['embedding'], rtol=1e-5)


# Partition.


def named(sizes, on):
    """The shardings of the parameters on a mesh."""
    return jax.tree.map(
        lambda names: NamedSharding(on, mesh.spec(names)),
        model.logical_axes(sizes),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize(('fsdp', 'tensor'), [(256, 1), (64, 4), (64, 1)])
def test_a_billion_parameters_are_cut_evenly(fsdp, tensor):
    """v5e:16x16 and v5p:4x4x4; each axis has a rule, and every kernel is cut."""
    sizes = {'data': 1, 'fsdp': fsdp, 'tensor': tensor}
    shapes, names = model.shapes(of('1b')), model.logical_axes(of('1b'))

    lengths = dict(layers=32, embed=1536, heads=12, head_dim=128, mlp=4096, vocab=32768)

    def check(leaf, axes):
        assert leaf.shape == tuple(lengths[axis] for axis in axes)
        rules = [mesh.RULES[axis] for axis in axes]
        pieces = [sizes[rule] if rule else 1 for rule in rules]
        assert all(n % p == 0 for n, p in zip(leaf.shape, pieces, strict=True))
        assert math.prod(pieces) == fsdp * tensor or axes[-1] in ('embed', 'head_dim')

    jax.tree.map(check, shapes, names, is_leaf=lambda x: isinstance(x, tuple))


COLLECTIVE = '|'.join(compiled.KINDS)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


@pytest.mark.parametrize('shape', MESHES, ids=lambda shape: 'x'.join(map(str, shape)))
def test_loss_and_gradients_in_a_mesh_are_one_device_s(shape):
    sizes = of('tiny', compute_dtype=jnp.dtype('float32'), tied=False, end=256)
    params = jax.jit(functools.partial(model.init, sizes))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(258, size=(8, 41))
    batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:]}
    forward = model.forward(sizes)

    @jax.jit
    def step(params, batch):
        def mean_loss(params):
            return loss.training_loss(forward(params, batch['inputs']), batch['targets'], 1e-4)

        return jax.value_and_grad(mean_loss)(params)

    expected = step(params, batch)
    on = mesh.make(dict(zip(mesh.AXES, shape, strict=True)))
    with jax.set_mesh(on):
        cut = jax.device_put(params, named(sizes, on))
        rows = jax.device_put(batch, NamedSharding(on, mesh.spec(('batch', None))))
        found = step(cut, rows)
        text = step.lower(cut, rows).compile().as_text()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
        jax.device_get(found),
        jax.device_get(expected),
    )
    # Each device has its rows and its part of heads, hidden units and tokens, and no more.
    rows, tensor = 8 // (shape[0] * shape[1]), shape[2]
    for pieces in ((40, 384 // tensor), (40, 192 // tensor), (40, 4 // tensor, 16)):
        assert f'f32[{rows},{",".join(map(str, pieces))}]' in text
    assert not any(f'f32[8,40,{columns}]' in text for columns in (384, 192))
    # Only parameters are gathered, and activations nothing but summed.
    assert set(re.findall(COLLECTIVE, text)) <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    gathered = re.findall(r'= \(?(.*?) all-gather', text)
    assert bool(gathered) == (shape[1] > 1)
    assert not any('40' in re.findall(r'\d+', result) for result in gathered)
