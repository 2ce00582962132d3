"""A step whose updates are applied: one pass over memory where a transformation can."""

from typing import Any

import optax


def update_and_apply(
    tx: optax.GradientTransformation,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    r"""One step of an optimizer: ``tx.update``, then ``optax.apply_updates``.

    For any transformation the same as these two, to rounding. What a transformation returns must
    be in memory before it can be applied, if a kernel has made it; so `sonew`, where it goes
    through its kernel, moves the parameters there, in place: with ``graft=None`` or
    ``delayed_graft=True``, as else it is not known before the kernel has run how far. A step then
    reads and writes 36 bytes for each float32 parameter in place of 44, where Adam's has 28.

    It does so where the alias itself is ``tx``, or `explicit_sharding` of it: what wraps or
    follows it (``optax.chain``, ``optax.masked``, ``optax.inject_hyperparams``) wants to see its
    updates. Clip gradients before, by hand.

    Args:
      tx: any transformation whose updates are to be added to the parameters.
      updates: the gradients, a tree like the parameters'.
      state: the state of ``tx``.
      params: the parameters, which donated (``jax.jit(..., donate_argnums=...)``) are written in
        place.
      **extra_args: further arguments of ``tx.update``, such as ``value``.

    Returns:
      The new parameters, of their dtypes, and the new state.

    Raises:
      ValueError: as ``tx.update``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> params, grads = jnp.ones((3, 2)), jnp.full((3, 2), 0.5)
      >>> tx = precond_optax.sonew(0.1, graft=None, weight_decay=1e-2)
      >>> state = tx.init(params)
      >>> new, _ = precond_optax.update_and_apply(tx, grads, state, params)
      >>> updates, _ = tx.update(grads, state, params)
      >>> bool(jnp.allclose(new, optax.apply_updates(params, updates)))
      True
    """
    applied = getattr(tx.update, 'applied', None)
    if applied is not None:
        return applied(updates, state, params, **extra_args)
    tx = optax.with_extra_args_support(tx)
    updates, state = tx.update(updates, state, params, **extra_args)
    return optax.apply_updates(params, updates), state
