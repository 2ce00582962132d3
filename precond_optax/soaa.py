r"""SOAA, a diagonal Fisher matrix with an adaptive trust region: state, transformation, alias."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, leafwise
from precond_optax.checks import Scalar
from precond_optax.layout import LeafLayout

_FISHERS = ('uncentered', 'centered')
# The least divisor. XLA multiplies divisors with each other: the least float would become zero.
_LEAST = 2.0**-100


class ScaleBySoaaState(NamedTuple):
    """State of ``scale_by_soaa``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: mean of the gradients
    nu: optax.Updates  # like the parameters, of stats_dtype: s, mean of their squares
    # Likewise: v, mean of the squares about the mean; 'uncentered': optax.MaskedNode(), v is s.
    fisher: optax.Updates
    # Of the whole tree, shape=(), float32 at least:
    trust_region: jax.Array  # dt
    predicted_reduction: jax.Array  # pr, of the last step, by the quadratic model
    loss_average: jax.Array  # l_avg, without bias correction


def _over(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x / y`` for ``y >= 0``; 0 / 0 is 0, so that eps = 0 makes no NaN."""
    return x / jnp.maximum(y, _LEAST)


def scale_by_soaa(  # noqa: D417 (its arguments are those of `soaa`)
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 0.25,
    eps: Scalar = 1e-8,
    *,
    total_steps: Scalar,
    fisher: str = 'uncentered',
    learning_rate_for_prediction: optax.ScalarOrSchedule = 1.0,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The direction of SOAA, to be subtracted; no learning rate and no weight decay.

    The math is in `soaa`. The direction has the shapes and dtypes of the gradients.

    Args:
      b1, b2, gamma, eps, total_steps, fisher, mu_dtype, stats_dtype, stochastic_rounding: as in
        `soaa`, with the same defaults.
      learning_rate_for_prediction: what the direction is multiplied with by those that follow in
        the chain, a number >= 0 or a schedule: the predicted reduction hangs on it.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleBySoaaState`, whose ``update``
      takes the loss as ``value``.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken; in
        ``update``, if ``value`` is no real scalar.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> direction = precond_optax.scale_by_soaa(
      ...   total_steps=100, learning_rate_for_prediction=0.01)
      >>> tx = optax.chain(direction, optax.scale_by_learning_rate(0.01))
      >>> params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
      >>> updates, state = tx.update(params, tx.init(params), value=4.0)
      >>> print(f'{updates["bias"][0]:.4f}', state[0].trust_region)
      -0.0050 1.0

    References:
      See `soaa`.
    """
    checks.in_range('b1', b1, 0, 1)
    checks.in_range('b2', b2, 0, 1)
    checks.in_range('gamma', gamma, 0, 1)
    checks.in_range('eps', eps, 0)
    checks.in_range('total_steps', total_steps, 1)
    checks.one_of('fisher', fisher, _FISHERS)
    if not callable(learning_rate_for_prediction):
        checks.in_range('learning_rate_for_prediction', learning_rate_for_prediction, 0)
    checks.float_dtype('mu_dtype', mu_dtype)
    checks.float_dtype('stats_dtype', stats_dtype)
    checks.flag('stochastic_rounding', stochastic_rounding)
    centered = fisher == 'centered'

    def stored(facts: LeafLayout) -> jnp.dtype:
        return jnp.dtype(stats_dtype or facts.compute_dtype)

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        return {
            'mu': jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype),
            'nu': jnp.zeros_like(leaf, dtype=stored(facts)),
            'fisher': jnp.zeros_like(leaf, stored(facts)) if centered else optax.MaskedNode(),
        }

    def means(
        grad: jax.Array, state: ScaleBySoaaState, facts: LeafLayout
    ) -> tuple[leafwise.Fields, jax.Array, jax.Array, jax.Array]:
        """A leaf's new means, and m, s and v with their bias corrected."""
        # A square that overflows would stay infinite for ever, and the sums with it. A sixteenth:
        # so that no rounding or correction of the bias overflows either.
        most = min(float(jnp.finfo(d).max) for d in (stored(facts), grad.dtype)) / 16

        def mean_square(old: jax.Array, x: jax.Array) -> jax.Array:
            return b2 * old + (1 - b2) * jnp.minimum(x * x, most)

        changed = {'mu': b1 * state.mu + (1 - b1) * grad, 'nu': mean_square(state.nu, grad)}
        if centered:
            held = 1 - b1 ** (state.count - 1)  # of the weights; none before the first step
            last = state.mu / jnp.where(state.count > 1, held, 1)
            changed['fisher'] = mean_square(state.fisher, grad - last)
        correction = 1 / (1 - b2**state.count)
        v = changed.get('fisher', changed['nu'])
        m = changed['mu'] / (1 - b1**state.count)
        return changed, m, changed['nu'] * correction, v * correction

    def before(
        grad: jax.Array, state: ScaleBySoaaState, facts: LeafLayout
    ) -> dict[str, jax.Array]:
        # Only their ratio counts; scaled so that no sum of large squares overflows.
        _, m, _, v = means(grad, state, facts)
        return {'gradient': jnp.sum((m * 2**-20) ** 2), 'fisher': jnp.sum((v + eps) * 2**-40)}

    def update_leaf(
        grad: jax.Array, state: ScaleBySoaaState, facts: LeafLayout, sums: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, leafwise.Fields]:
        changed, m, s, v = means(grad, state, facts)
        ratio = jnp.minimum(_over(sums['gradient'], sums['fisher']), jnp.finfo(grad.dtype).max)
        dt = state.trust_region
        direction = dt * _over(m, jnp.maximum(dt * (v + ratio * v), jnp.sqrt(s)) + eps)
        reduction = jnp.sum(direction * (m - 0.5 * v * direction))
        return direction, changed | {'sums': {'reduction': reduction}}

    def after(
        state: ScaleBySoaaState, sums: Mapping[str, jax.Array], extra_args: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """The trust region by what the last step promised; and what this one promises."""
        if extra_args.get('value') is None:
            return {}
        value = checks.real_scalar('value', extra_args['value']).astype(state.loss_average.dtype)
        given = jnp.isfinite(value)
        value = jnp.where(given, value, 0)
        taken = state.count - 1
        # The mean loss less this one, in a form that is exactly zero in the first step: rounding
        # over eps would pass for a reduction.
        drop = state.loss_average - (1 - b1**taken) * value
        drop = b1 * drop / (1 - b1**state.count)
        ratio = _over(drop, jnp.maximum(state.predicted_reduction, eps))
        done = taken.astype(value.dtype) / total_steps
        dt = jnp.maximum(ratio * state.trust_region, (1 - gamma) ** done)
        rate = learning_rate_for_prediction
        new = {
            'trust_region': jnp.minimum(dt, 1 + gamma**done),
            'predicted_reduction': (rate(taken) if callable(rate) else rate) * sums['reduction'],
            'loss_average': b1 * state.loss_average + (1 - b1) * value,
        }
        return {name: jnp.where(given, x, getattr(state, name)) for name, x in new.items()}

    return leafwise.leafwise(
        ScaleBySoaaState,
        init_leaf,
        update_leaf,
        layout=None,
        stochastic=('nu', 'fisher') if stochastic_rounding else (),
        whole=leafwise.Whole(
            {'trust_region': 1.0, 'predicted_reduction': 0.0, 'loss_average': 0.0}, before, after
        ),
        describe=lambda facts: f'SOAA, diagonal, {fisher}',
    )


def soaa(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 0.25,
    eps: Scalar = 1e-8,
    *,
    total_steps: Scalar,
    fisher: str = 'uncentered',
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAA: a diagonal Fisher matrix, and a trust region that opens and closes with the loss.

    .. math::
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      s_t &= \beta_2 s_{t-1} + (1 - \beta_2) g_t^2 \\
      v_t &= s_t \quad \text{or} \quad
             \beta_2 v_{t-1} + (1 - \beta_2) (g_t - \hat m_{t-1})^2 \\
      F_t &= \left(1 + \sum \hat m_t^2 \big/ \sum (\hat v_t + \epsilon)\right) \hat v_t \\
      u_t &= \hat m_t d_t / \left(\max(d_t F_t, \sqrt{\hat s_t}) + \epsilon\right) \\
      \theta_{t+1} &= \theta_t - \alpha_t \left(u_t + \lambda \theta_t\right)

    entry by entry, with sums over the whole tree and bias-corrected :math:`\hat m, \hat s, \hat
    v`. Given the loss :math:`l_t` of the same batch before the step, as ``update(grads, state,
    params, value=loss)``, the trust region :math:`d`, which starts at 1, follows what was gained
    by what had been predicted:

    .. math::
      \bar l_t &= \beta_1 \bar l_{t-1} + (1 - \beta_1) l_t, \quad
        \hat l_t = \bar l_t / (1 - \beta_1^t) \\
      d_{t+1} &= \min\left(\max\left(
        d_t (\hat l_t - l_t) / \max(p_{t-1}, \epsilon),
        (1 - \gamma)^{(t-1)/T}\right), 1 + \gamma^{(t-1)/T}\right) \\
      p_t &= \alpha_t \sum \left(\hat m_t u_t - \hat v_t u_t^2 / 2\right)

    so between 1 and 2 at first, between :math:`1 - \gamma` and :math:`1 + \gamma` at the end of
    T steps. The state's ``trust_region``, ``predicted_reduction`` and ``loss_average`` are the
    :math:`d, p, \bar l` after the step; ``optax.tree.get(state, 'trust_region')`` finds them.

    Without a loss, or with one that is not finite, these three stay as they are: a run without
    losses has :math:`d = 1`. Give it in all steps or in none, for :math:`t` counts them all. In
    a ``shard_map`` or ``pmap`` it must be the same on all devices, as the gradients are.
    ``optax.MultiSteps`` passes on the loss of the last micro-batch.

    Where gradients are small, :math:`\sqrt{\hat s}` is the larger one and the direction is
    Adam's times :math:`d`; where they are large, it is :math:`\hat m / F`, whatever :math:`d` is.
    So the scale of the loss matters.

    A NaN in one gradient is a NaN in the updates of all leaves, by the sums: wrap with
    ``optax.apply_if_finite``. State beside the parameters: 2 arrays of each leaf's shape, as
    Adam's; 3 for ``fisher='centered'``.

    Args:
      learning_rate: the step size, a number or a schedule; it enters the prediction too.
      b1: decay of the mean of the gradients and of the mean of the losses, in [0, 1).
      b2: decay of the means of squares, in [0, 1).
      gamma: how far the trust region's bounds are from 1 at the end, in [0, 1).
      eps: added to the denominators, and the least predicted reduction, >= 0.
      total_steps: T, the number of steps of the whole run, >= 1.
      fisher: v: 'uncentered', the mean of the squares, or 'centered', that of the squares about
        the mean before the step.
      mu_dtype: dtype in which the mean of the gradients is stored; None: the parameter's.
      stats_dtype: dtype in which the means of squares are stored; None: the parameter's, but
        float32 at least. Squares above a sixteenth of its largest number count as that.
      stochastic_rounding: whether statistics stored in bfloat16 are rounded stochastically, so
        that increments below their precision are not lost. Drawn from the step count and the
        leaf's path: a resumed run draws the same.
      weight_decay: decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'. With
      ``optax.inject_hyperparams`` all numbers may be traced; name mu_dtype, stats_dtype or a
      mask that is a function in its ``static_args``, where you give one.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype, with its path; in ``update``, if ``value`` is no real scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.soaa(learning_rate=0.1, total_steps=100)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   loss, grads = jax.value_and_grad(f)(params)
      ...   updates, state = tx.update(grads, state, value=loss)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Vo, `Efficient Second-Order Neural Network Optimization via Adaptive Trust Region Methods
      <https://arxiv.org/abs/2410.02293>`_, 2024: Algorithm 1. ``u`` here is its adjusted
      gradient, :math:`d` its ``dt``, :math:`p` its ``pr``. It prints a ``v`` that it never
      updates: hence the two readings; the centred one is that of Tadam (Neural Networks 167,
      2023), on which it builds.
    """
    checks.learning_rate(learning_rate)
    direction = scale_by_soaa(
        b1,
        b2,
        gamma,
        eps,
        total_steps=total_steps,
        fisher=fisher,
        learning_rate_for_prediction=learning_rate,
        mu_dtype=mu_dtype,
        stats_dtype=stats_dtype,
        stochastic_rounding=stochastic_rounding,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)
