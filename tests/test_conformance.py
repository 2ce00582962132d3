"""Every generic check on every row, slow for some, and on a row broken on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import precond_optax
from tests import cases, checks, quick

CHECKS = {check.__name__: check for check in checks.ALL}


def pairs():
    """Every check and row. Quick are all of the control and of SONew, half of the other rows'."""
    for i, (name, check) in enumerate(CHECKS.items()):
        for j, row in enumerate(quick.rows(cases.CASES)):
            left_out = row.id not in ('adam', 'sonew') and (i + j) % 2
            marks = [*row.marks, *[pytest.mark.slow] * left_out]
            yield pytest.param(check, *row.values, marks=marks, id=f'{name}-{row.id}')


@pytest.mark.parametrize(('check', 'case'), list(pairs()))
def test_check(check, case):
    check(case)


def broken(change, **fields):
    """A row whose factory is SONew's with something put wrong by ``change``."""

    def factory(learning_rate, b1=0.9, b2=0.9, eps=1e-2, mu_dtype=None, layout=None):
        tx = precond_optax.sonew(learning_rate, b1, b2, eps, mu_dtype=mu_dtype, layout=layout)
        return change(tx, learning_rate)

    name = getattr(change, '__name__', 'broken')
    return dataclasses.replace(cases.Case(name, factory, state_bytes=12), **fields)


def after(function):
    """Changes the updates."""

    def change(tx, _):
        def update(grads, state, params=None, **extra):
            updates, state = tx.update(grads, state, params, **extra)
            return function(updates, grads), state

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return change


def each(function):
    """Changes the updates leaf by leaf."""
    return after(lambda updates, grads: jax.tree.map(function, updates, grads))


def refuses_extra_arguments(tx, _):
    return optax.GradientTransformation(tx.init, lambda g, s, p=None: tx.update(g, s, p))


def counts_its_traces(tx, _):
    """Something outside the state: whoever traces it a second time gets other numbers."""
    steps = []

    def update(grads, state, params=None, **extra):
        steps.append(0)
        updates, state = tx.update(grads, state, params, **extra)
        return jax.tree.map(lambda u: u * len(steps), updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


_made = []


def differs_each_time(tx, learning_rate):
    """As if drawn from an unseeded generator at construction."""
    _made.append(0)
    return each(lambda u, g: u * (1 + 0.1 * len(_made)))(tx, learning_rate)


def changes_a_state_dtype(tx, _):
    def update(grads, state, params=None, **extra):
        updates, inner = tx.update(grads, state[0], params, **extra)
        return updates, (inner, state[1].astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(
        lambda params: (tx.init(params), jnp.zeros([], jnp.int32)), update
    )


def holds_ones_that_are_no_parameters(tx, _):
    def update(grads, state, params=None, **extra):
        updates, inner = tx.update(grads, state[0], params, **extra)
        return updates, (inner, state[1])

    return optax.GradientTransformationExtraArgs(
        lambda params: (tx.init(params), jnp.ones(4)), update
    )


def needs_arrays(tx, _):
    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(jax.tree.map(lambda p: p * 0, params)), tx.update
    )


def applies_twice_as_much(tx, learning_rate):
    def update(grads, state, params=None, **extra):
        return tx.update(grads, state, params, **extra)

    def applied(grads, state, params, **extra):
        new, state = precond_optax.update_and_apply(tx, grads, state, params, **extra)
        return jax.tree.map(lambda a, b: 2 * a - b, new, params), state

    update.applied = applied
    return optax.GradientTransformationExtraArgs(tx.init, update)


def drops_schedules(tx, learning_rate):
    return precond_optax.sonew(1e-3) if callable(learning_rate) else tx


def counts_the_leaves_of_others(updates, grads):
    count = len(jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, optax.MaskedNode)))
    return jax.tree.map(lambda u: u / count, updates)


def replicates(update, _):
    if jax.sharding.get_abstract_mesh().empty:
        return update
    return jax.sharding.reshard(update, jax.P())


def other_dtype(update, _):
    return update.astype(jnp.bfloat16 if update.dtype == jnp.float32 else jnp.float32)


def row(factory, **fields):
    return dataclasses.replace(cases.Case(factory.__name__, factory, state_bytes=12), **fields)


def without_layers(learning_rate, b1=0.9, b2=0.9, eps=1e-2, mu_dtype=None, layout=None):
    return precond_optax.sonew(learning_rate, b1, b2, eps, mu_dtype=mu_dtype)


def without_mu_dtype(learning_rate, b1=0.9, b2=0.9, eps=1e-2, mu_dtype=None, layout=None):
    return precond_optax.sonew(learning_rate, b1, b2, eps, layout=layout)


def with_its_own_b2(learning_rate, b1=0.9, b2=0.9, eps=1e-2):
    return precond_optax.sonew(learning_rate, b1, 0.5 if isinstance(b2, jax.Array) else b2, eps)


# For each check, what it must reject; by an assertion, where no other error is named.
BROKEN = {
    'extra_arguments_are_ignored': broken(refuses_extra_arguments),
    'no_recompilation_on_the_second_update': broken(changes_a_state_dtype),
    'state_is_a_scan_carry': broken(changes_a_state_dtype),
    'update_dtypes_are_the_gradients': broken(each(other_dtype)),
    'mixed_dtypes_stay_apart': broken(each(other_dtype)),
    'everything_is_finite': broken(each(lambda u, g: jnp.log(u))),
    'eager_equals_jitted': broken(counts_its_traces),
    'init_takes_shapes_alone': broken(needs_arrays),
    'map_params_reaches_the_state': broken(holds_ones_that_are_no_parameters),
    'injected_hyperparameters_give_the_same': row(with_its_own_b2),
    'injected_hyperparameters_may_be_wider_than_parameters': row(with_its_own_b2),
    'schedule_equals_constant': broken(drops_schedules),
    'multi_steps_is_one_step_on_the_mean': broken(counts_its_traces),
    'masked_and_partitioned_leaves_are_left_alone': broken(after(counts_the_leaves_of_others)),
    'chained_with_clipping': broken(counts_its_traces),
    'nan_is_left_to_apply_if_finite': broken(each(lambda u, g: jnp.nan_to_num(u))),
    'zero_gradients_give_zero_updates': broken(each(lambda u, g: u + 1e-9)),
    'one_huge_entry_is_finite': broken(each(lambda u, g: u + g**3)),
    'updates_do_not_depend_on_the_gradients_scale': broken(each(lambda u, g: u + g)),
    'mu_dtype_is_honoured': row(without_mu_dtype),
    'state_bytes_are_as_documented': dataclasses.replace(cases.BY_NAME['sonew'], state_bytes=8),
    'resumed_run_is_the_same_bit_for_bit': broken(differs_each_time),
    'stacked_leaves_equal_their_layers': row(without_layers),
    'vmap_over_models_equals_the_loop': broken(counts_its_traces),
    'pmap_equals_one_device': broken(counts_its_traces),
    'donated_state_is_not_needed_again': broken(counts_its_traces),
    'update_and_apply_is_both': broken(applies_twice_as_much),
    'schedule_free_wraps_it': broken(each(lambda u, g: -u)),
    'sharded_leaves_keep_their_sharding': broken(each(replicates)),
    'auto_sharded_leaves_give_the_same': broken(counts_its_traces),
    'wrong_leaves_are_named': dataclasses.replace(cases.ADAM, real_only=True),
    'wrong_gradients_are_named': dataclasses.replace(cases.ADAM, real_only=True),
    'it_converges_on_matrices': broken(each(lambda u, g: -u)),
}
REJECTED_BY = {
    'extra_arguments_are_ignored': TypeError,
    'init_takes_shapes_alone': TypeError,
}


@pytest.mark.parametrize('name', CHECKS)
def test_check_rejects_what_is_broken(name):
    assert name in BROKEN, f'no broken transformation for {name}'
    with pytest.raises(REJECTED_BY.get(name, AssertionError)):
        CHECKS[name](BROKEN[name])
