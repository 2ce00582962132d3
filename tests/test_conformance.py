"""Every generic check on every row, and every check on a row broken on purpose."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import precond_optax
from tests import cases, checks

CHECKS = {check.__name__: check for check in checks.ALL}


@pytest.mark.parametrize('case', cases.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize('check', CHECKS.values(), ids=CHECKS.keys())
def test_check(check, case):
    check(case)


def broken(name, **changes):
    """A row whose factory is Adam's or SONew's with something put wrong by ``change``."""

    def wrap(change):
        def factory(learning_rate, b1=0.9, b2=0.95, eps=1e-6, mu_dtype=None, layout=None):
            tx = precond_optax.sonew(learning_rate, b1, b2, eps, mu_dtype=mu_dtype, layout=layout)
            return change(tx, learning_rate)

        row = cases.Case(name, factory, state_arrays=3)
        return dataclasses.replace(row, **changes)

    return wrap


def after(function):
    """Changes the updates."""

    def change(tx, _):
        def update(grads, state, params=None, **extra):
            updates, state = tx.update(grads, state, params, **extra)
            return function(updates, grads), state

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return change


def on_state(init=lambda state, params: state, update=lambda state, grads: state):
    """Changes the state."""

    def change(tx, _):
        def new_update(grads, state, params=None, **extra):
            updates, state = tx.update(grads, state, params, **extra)
            return updates, update(state, grads)

        return optax.GradientTransformationExtraArgs(
            lambda params: init(tx.init(params), params), new_update
        )

    return change


def strict(tx, _):
    return optax.GradientTransformation(tx.init, lambda g, s, p=None: tx.update(g, s, p))


def counts_in_python(tx, _):
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
    return after(_map(lambda u, g: u * (1 + 0.1 * len(_made))))(tx, learning_rate)


def concrete(tx, _):
    def update(grads, state, params=None, **extra):
        if bool(jnp.any(jax.tree.leaves(grads)[0] > 1e30)):
            return grads, state
        return tx.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def drops_schedules(tx, learning_rate):
    return precond_optax.sonew(1e-3) if callable(learning_rate) else tx


def needs_arrays(tx, _):
    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(jax.tree.map(lambda p: p * 0, params)), tx.update
    )


def _map(function):
    return lambda updates, grads: jax.tree.map(function, updates, grads)


def replicated(updates, grads):
    return jax.tree.map(lambda u: jax.sharding.reshard(u, jax.P()), updates)


def _unlayered(learning_rate, b1=0.9, b2=0.95, eps=1e-6, mu_dtype=None, layout=None):
    return precond_optax.sonew(learning_rate, b1, b2, eps, mu_dtype=mu_dtype)


def _no_mu_dtype(learning_rate, b1=0.9, b2=0.95, eps=1e-6, mu_dtype=None, layout=None):
    return precond_optax.sonew(learning_rate, b1, b2, eps, layout=layout)


def _static_b2(learning_rate, b1=0.9, b2=0.95, eps=1e-6, mu_dtype=None, layout=None):
    return precond_optax.sonew(learning_rate, b1, 0.5 if isinstance(b2, jax.Array) else b2, eps)


def _row(name, factory, **changes):
    return dataclasses.replace(cases.Case(name, factory, state_arrays=3), **changes)


wrong_dtype = _map(lambda u, g: u.astype(jnp.bfloat16 if u.dtype == jnp.float32 else jnp.float32))
nan_scrubbed = _map(lambda u, g: jnp.nan_to_num(u))


def cross_talk(updates, grads):
    """Counts the leaves of others."""
    count = len(jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, optax.MaskedNode)))
    return jax.tree.map(lambda u: u / count, updates)


BROKEN = {
    'extra_arguments_are_ignored': broken('strict')(strict),
    'no_recompilation_on_the_second_update': broken('grows')(
        on_state(update=lambda state, grads: (*state, jnp.zeros([])))
    ),
    'state_is_a_scan_carry': broken('widens')(
        on_state(
            update=lambda state, grads: jax.tree.map(
                lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state
            )
        )
    ),
    'update_dtypes_are_the_gradients': broken('wrong_dtype')(after(wrong_dtype)),
    'mixed_dtypes_stay_apart': broken('wrong_dtype')(after(wrong_dtype)),
    'everything_is_finite': broken('log')(after(_map(lambda u, g: jnp.log(u)))),
    'eager_equals_jitted': broken('counts')(counts_in_python),
    'init_takes_shapes_alone': broken('needs_arrays')(needs_arrays),
    'map_params_reaches_the_state': broken('list_state')(
        on_state(
            init=lambda state, params: (state, [jnp.ones(4) for _ in jax.tree.leaves(params)])
        )
    ),
    'injected_hyperparameters_give_the_same': _row('static_b2', _static_b2),
    'schedule_equals_constant': broken('drops_schedules')(drops_schedules),
    'multi_steps_is_one_step_on_the_mean': broken('concrete')(concrete),
    'masked_and_partitioned_leaves_are_left_alone': broken('cross_talk')(after(cross_talk)),
    'chained_with_clipping': broken('concrete')(concrete),
    'nan_is_left_to_apply_if_finite': broken('scrubs')(after(nan_scrubbed)),
    'zero_gradients_give_zero_updates': broken('noise')(after(_map(lambda u, g: u + 1e-9))),
    'one_huge_entry_is_finite': broken('squares')(after(_map(lambda u, g: u + g**3))),
    'updates_do_not_depend_on_the_gradients_scale': broken('mixes')(
        after(_map(lambda u, g: u + g))
    ),
    'mu_dtype_is_honoured': _row('no_mu_dtype', _no_mu_dtype),
    'state_bytes_are_as_documented': dataclasses.replace(cases.BY_NAME['sonew'], state_arrays=2),
    'resumed_run_is_the_same_bit_for_bit': broken('differs')(differs_each_time),
    'stacked_leaves_equal_their_layers': _row('unlayered', _unlayered),
    'vmap_over_models_equals_the_loop': broken('concrete')(concrete),
    'pmap_equals_one_device': broken('concrete')(concrete),
    'donated_state_is_not_needed_again': broken('counts')(counts_in_python),
    'schedule_free_wraps_it': broken('concrete')(concrete),
    'sharded_leaves_keep_their_sharding': broken('replicates')(after(replicated)),
    'auto_sharded_leaves_give_the_same': broken('counts')(counts_in_python),
    'wrong_leaves_are_named': dataclasses.replace(cases.ADAM, real_only=True),
    'it_converges_on_matrices': broken('uphill')(after(_map(lambda u, g: -u))),
}


@pytest.mark.parametrize('name', CHECKS)
def test_check_rejects_what_is_broken(name):
    assert name in BROKEN, f'no broken transformation for {name}'
    with pytest.raises((AssertionError, TypeError, ValueError, jax.errors.JAXTypeError)):
        CHECKS[name](BROKEN[name])
