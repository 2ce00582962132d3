"""From configs to optimizers: names, schedules of hyperparameters, rules for leaves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import precond_optax
from experiments import optimizers, train
from tests.experiments.small import OPTIMIZERS, config_of, small_task

PARAMS = {'first': jnp.ones((4, 3)), 'second': jnp.ones((3, 4))}


def made(name, of_task=None, **changes):
    config = config_of('optimizers', name)
    config.update(changes)
    return optimizers.make(config, lambda peak: peak, 10, of_task)


def test_every_config_is_a_known_optimizer():
    assert {config_of('optimizers', name).name for name in OPTIMIZERS} == set(optimizers.FACTORIES)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_workdir_keeps_every_config(name, tmp_path):
    """Also after the task's check has taken the search space away; rules are kept as lists."""
    config = config_of('optimizers', name)
    if 'layout' in config:
        config.layout = (('first', config_dict.ConfigDict(dict(band=4))),)
    train.prepare(small_task(epochs=1), config, tmp_path)
    kept = json.loads((tmp_path / 'config.json').read_text())['optimizer']
    assert kept['name'] == config.name
    assert 'search_space' not in kept
    assert kept.get('layout', [['first', {'band': 4}]]) == [['first', {'band': 4}]]


@pytest.mark.parametrize(('given', 'expected'), [(None, 12), (30, 30)])
def test_total_steps_are_the_run_s_unless_given(given, expected, monkeypatch, tmp_path):
    seen = []
    real = optimizers.FACTORIES['soaa']

    def factory(**keywords):
        seen.append(keywords['total_steps'])
        return real(**keywords)

    monkeypatch.setitem(optimizers.FACTORIES, 'soaa', factory)
    config = config_of('optimizers', 'soaa')
    config.total_steps = given
    train.prepare(small_task(epochs=3), config, tmp_path)
    assert seen == [expected]


def test_schedules_go_over_the_run(rng):
    """As by hand: b2 of the kth of ten steps is 0.9 and k - 1 tenths of the way to 0.99."""
    tx = made('sonew', eps=0.1, schedules=dict(b2=(0.9, 0.99)))
    state = tx.init(PARAMS)
    by_hand = made('sonew', eps=0.1).init(PARAMS)
    for step in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
        updates, state = tx.update(grads, state, PARAMS)
        expected, by_hand = made('sonew', eps=0.1, b2=0.9 + 0.009 * step).update(
            grads, by_hand, PARAMS
        )
        for name in PARAMS:
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4)
    assert state.hyperparams['b2'] == pytest.approx(0.918)


def test_rules_come_before_the_tasks():
    task = {'': precond_optax.LeafRule(band=2)}
    layout = (('first', dict(band=4)),)
    leaves = precond_optax.plan(made('sonew', task, layout=layout), PARAMS).leaves
    assert [leaf.treatment[:7] for leaf in leaves] == ['4 bands', '2 bands']
    leaves = precond_optax.plan(made('sonew', task, layout=(('', dict(band=4)),)), PARAMS).leaves
    assert [leaf.treatment[:7] for leaf in leaves] == ['4 bands', '4 bands']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(schedules=dict(b3=(0.9, 0.99))), r"optimizer.schedules are of .*'b2'.*got \['b3'\]"),
        (dict(schedules=dict(b2=(0.9,))), r"'sonew' does not take these keywords"),
        (dict(layout=(('first', dict(bands=4)),)), r'optimizer.layout must be pairs .*bands'),
        (dict(layout=('first',)), r'optimizer.layout must be pairs'),
    ],
)
def test_wrong_schedules_and_rules(changes, message):
    with pytest.raises(ValueError, match=message):
        made('sonew', **changes)
