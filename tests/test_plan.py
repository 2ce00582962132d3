"""The plan is that of the transformation it is asked about."""

import jax
import jax.numpy as jnp
import optax
import pytest

import precond_optax
from precond_optax import LeafRule

PARAMS = {
    'embedding': jax.ShapeDtypeStruct((1000, 64), jnp.float32),
    'layers': {
        'kernel': jax.ShapeDtypeStruct((12, 64, 32), jnp.bfloat16),
        'bias': jax.ShapeDtypeStruct((12, 32), jnp.bfloat16),
    },
}
LAYOUT = {'embed': LeafRule(precondition=False), '^layers/': LeafRule(batch_axes=1)}


def real_bytes(tx, params):
    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params))
    return sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize('band', [0, 1])
@pytest.mark.parametrize('graft', ['adam', 'rmsprop_normalized'])
def test_bytes_are_those_of_the_state(band, graft):
    tx = precond_optax.sonew(1e-3, band=band, graft=graft, layout=LAYOUT)
    table = precond_optax.plan(tx, PARAMS)
    assert table.state_bytes == real_bytes(tx, PARAMS)
    assert table.adam_bytes + 4 == real_bytes(optax.adam(1e-3), PARAMS)
    kernel = next(leaf for leaf in table.leaves if leaf.path == 'layers/kernel')
    entries = 12 * 64 * 32
    # mu in bfloat16; nu, the off-diagonals and the graft's mean in float32
    assert kernel.state_bytes == entries * (2 + 4 * (1 + band + (graft != 'adam')))


def test_treatment_and_reason():
    leaves = precond_optax.plan(precond_optax.sonew(1e-3, layout=LAYOUT), PARAMS).leaves
    said = {leaf.path: (leaf.treatment, leaf.reason) for leaf in leaves}
    assert said == {
        'embedding': ('Adam direction', "rule 'embed'"),
        'layers/bias': ('Adam direction', "1-D after 1 batch axes (rule '^layers/')"),
        'layers/kernel': (
            'tridiagonal, 12 x 2048, order F',
            "2-D after 1 batch axes (rule '^layers/')",
        ),
    }


def test_all_rules_are_shown():
    params = {
        'embedding': jax.ShapeDtypeStruct((50000, 64), jnp.float32),
        'mlp': jax.ShapeDtypeStruct((12, 64, 32), jnp.float32),
        'query': jax.ShapeDtypeStruct((64, 8, 16), jnp.float32),
        'tiny': jax.ShapeDtypeStruct((1, 2), jnp.float32),
    }
    layout = {
        'mlp': LeafRule(batch_axes=1, band=4, order='C'),
        'query': LeafRule(merge_axes=((1, 2),), band=0),
        '': LeafRule(max_dim=32768),
    }
    tx = precond_optax.sonew(1e-3, band=2, layout=layout)
    table = precond_optax.plan(tx, params)
    said = {leaf.path: (leaf.treatment, leaf.reason) for leaf in table.leaves}
    assert said == {
        'embedding': ('Adam direction', "axis of 50000 > max_dim=32768 (rule '')"),
        'mlp': ('4 bands, 12 x 2048, order C', "2-D after 1 batch axes (rule 'mlp')"),
        'query': ('diagonal, 1 x 8192, order F', "seen as 64x128 (rule 'query')"),
        'tiny': ('tridiagonal, 1 x 2, order F', "2-D (rule '')"),
    }
    entries = {path: jnp.prod(jnp.array(x.shape)).item() for path, x in params.items()}
    arrays = {'embedding': 2, 'mlp': 6, 'query': 2, 'tiny': 3}
    for leaf in table.leaves:
        assert leaf.state_bytes == 4 * arrays[leaf.path] * entries[leaf.path]


def test_inside_wrappers():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {'ours': precond_optax.sonew(1e-3), 'adam': optax.adam(1e-3)},
            lambda params: {'embedding': 'adam', 'layers': {'kernel': 'ours', 'bias': 'ours'}},
        ),
    )
    table = precond_optax.plan(tx, PARAMS)
    by_path = {leaf.path: leaf for leaf in table.leaves}
    assert by_path['embedding'].treatment == 'not ours'
    assert by_path['embedding'].state_bytes == by_path['embedding'].adam_bytes
    assert by_path['layers/kernel'].treatment == 'tridiagonal, 1 x 24576, order F'
    assert table.state_bytes == real_bytes(tx, PARAMS)


def test_two_of_ours_on_a_leaf_are_both_named():
    tx = optax.chain(precond_optax.scale_by_sonew(band=0), precond_optax.scale_by_sonew())
    leaf = precond_optax.plan(tx, {'k': jnp.zeros((3, 2))}).leaves[0]
    assert leaf.treatment == 'diagonal, 1 x 6, order F + tridiagonal, 1 x 6, order F'
    tx = precond_optax.scale_by_sonew(graft=precond_optax.scale_by_sonew(band=0))
    leaf = precond_optax.plan(tx, {'k': jnp.zeros((3, 2))}).leaves[0]
    assert leaf.treatment == 'tridiagonal, 1 x 6, order F'


def test_a_memory_belongs_to_its_parameter():
    (leaf,) = precond_optax.plan(optax.lbfgs(3), {'k': jnp.zeros((3, 2))}).leaves
    # params, updates and the line search's gradient, and two memories of 10
    assert leaf.state_bytes == 4 * 6 * (3 + 2 * 10)


def test_shared_bytes_when_parameters_are_one_array():
    table = precond_optax.plan(precond_optax.sonew(1e-3), jnp.zeros((3, 2)))
    assert (table.leaves[0].state_bytes, table.shared_bytes) == (3 * 24, 4)
    assert table.leaves[0].path == '(root)'


def test_hyperparameters_of_a_parameters_name_are_shared():
    tx = optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)
    table = precond_optax.plan(tx, {'momentum': jnp.zeros(3), 'b1': jnp.zeros(2)})
    assert [leaf.state_bytes for leaf in table.leaves] == [8, 12]
    assert table.shared_bytes == 4 + 2 * 4


def test_rules_that_match_nothing_are_named():
    layout = {'embeding': LeafRule(precondition=False), **LAYOUT}
    table = precond_optax.plan(precond_optax.sonew(1e-3, layout=layout), PARAMS)
    assert table.unmatched_rules == ('embeding',)
    assert str(table).endswith("no leaf matches the rule 'embeding'")


def test_state_with_random_keys():
    tx = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), precond_optax.sonew(1e-3))
    assert precond_optax.plan(tx, {'k': jnp.zeros((3, 2))}).shared_bytes == 8 + 4 + 4


def test_what_a_wrapper_makes_of_leaves_is_listed_too():
    tx = optax.flatten(precond_optax.sonew(1e-3))
    params = {'w': jnp.ones((2, 3))}
    table = precond_optax.plan(tx, params)
    assert [(leaf.path, leaf.treatment) for leaf in table.leaves] == [
        ('w', 'not ours'),
        ('(root)', 'Adam direction'),
    ]
    assert table.state_bytes == real_bytes(tx, params)


def test_asking_twice_gives_the_same_plan():
    tx = precond_optax.sonew(1e-3)
    assert precond_optax.plan(tx, PARAMS) == precond_optax.plan(tx, PARAMS)


def test_table():
    text = str(precond_optax.plan(precond_optax.sonew(1e-3, layout=LAYOUT), PARAMS))
    assert text.splitlines()[-1].split()[0] == 'total'
    assert 'layers/kernel  12x64x32  bfloat16' in text
    assert len(text.splitlines()) == 1 + 1 + 3 + 1 + 1


def test_nothing_is_allocated():
    huge = {'kernel': jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
    assert precond_optax.plan(precond_optax.sonew(1e-3), huge).state_bytes > 10**13
