r"""Grafting: a method's direction with the magnitude of a first-order rule, leaf by leaf.

.. math::
  u \leftarrow u \, \|w\| / \|u\|

so that a learning rate found for the first-order rule carries over. The rules (methods share
``b1``, ``b2`` and the moments ``mu_hat``, ``nu_hat`` with them where they have them):

======================  ==================================================================
None                    no grafting
'adam'                  w = mu_hat / (sqrt(nu_hat) + 1e-8)
'momentum'              w = mu_hat
'sgd'                   w = g
'rmsprop_normalized'    n = g / (|g| + 1e-25), s <- b2 s + (1-b2) n^2, w = n / (sqrt(s) + 1e-10)
a transformation        w is its update (any ``optax.GradientTransformation``)
======================  ==================================================================

The norms are taken over a leaf, and over each of its layers where it has batch axes. ``b2 = 1``
means sums in place of means, as in AdaGrad, but for 'adam', which then takes the plain mean.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, leafwise
from precond_optax import layout as layout_lib
from precond_optax.checks import Scalar
from precond_optax.layout import LeafLayout

Graft: TypeAlias = str | optax.GradientTransformation | None

KINDS = (None, 'adam', 'momentum', 'sgd', 'rmsprop_normalized')
ADAM_EPS = 1e-8


def check(graft: Graft) -> None:
    """Raises ``ValueError`` unless ``graft`` is one of the kinds or a transformation."""
    if isinstance(graft, tuple) and hasattr(graft, 'init') and hasattr(graft, 'update'):
        return
    if not (graft is None or isinstance(graft, str)) or graft not in KINDS:
        allowed = ', '.join(map(repr, KINDS))
        raise ValueError(
            f'graft must be one of {allowed} or an optax.GradientTransformation, got {graft!r}.'
        )


def transformation(
    graft: Graft, b2: Scalar, layout: layout_lib.Layout
) -> optax.GradientTransformation | None:
    """The rule as a transformation of its own; None if it needs only what the method has.

    It sees, and has state for, the preconditioned leaves only.
    """
    if graft in ('adam', 'momentum'):
        return None
    rule = standalone(graft, 0.0, b2, layout)
    if rule is None:
        return None
    return optax.masked(rule, lambda tree: leafwise.preconditioned(tree, layout))


def standalone(
    graft: Graft, b1: Scalar, b2: Scalar, layout: layout_lib.Layout
) -> optax.GradientTransformation | None:
    """The rule for a method that has no moments of its own, on all leaves; None for 'sgd'."""
    if graft is None or graft == 'sgd':
        return None
    if graft == 'rmsprop_normalized':
        return scale_by_normalized_rms(b2, layout=layout)
    if isinstance(graft, str):
        return scale_by_moments(graft, b1, b2, layout=layout)
    return graft


def weight(b2: Scalar) -> Scalar:
    """The weight of the new in a mean of decay ``b2``; 1 for ``b2 = 1``, which makes it a sum.

    Example:
      >>> weight(0.75), weight(1.0)
      (0.25, 1.0)
    """
    if isinstance(b2, jax.Array):
        return jnp.where(b2 < 1, 1 - b2, 1)
    return 1 - b2 if b2 < 1 else 1.0


def adam_direction(mu_hat: jax.Array, nu_hat: jax.Array) -> jax.Array:
    """Adam's direction, ``mu_hat / (sqrt(nu_hat) + 1e-8)``.

    Args:
      mu_hat: the bias-corrected mean of the gradients, of any shape.
      nu_hat: the bias-corrected mean of their squares, of that shape.

    Returns:
      The direction, of that shape; without unit.
    """
    return mu_hat / (jnp.sqrt(nu_hat) + ADAM_EPS)


def magnitude(graft: Graft, mu_hat: jax.Array, nu_hat: jax.Array, own: jax.Array) -> jax.Array:
    """W of a leaf.

    Args:
      graft: the kind.
      mu_hat: the method's bias-corrected mean of the gradients, for 'adam' and 'momentum'.
      nu_hat: the method's bias-corrected mean of their squares, for 'adam'.
      own: the update of ``transformation(graft, ...)``, for the other kinds; the gradient if that
        is None, for 'sgd'.

    Returns:
      w, of the leaf's shape.
    """
    if graft == 'adam':
        return adam_direction(mu_hat, nu_hat)
    return mu_hat if graft == 'momentum' else own


def norm(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The Euclidean norm over ``axes``, which are kept with size 1."""
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(axes), keepdims=True))


def rescale(direction: jax.Array, magnitude: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The direction with the magnitude's norm over ``axes``; zero where the direction is zero.

    Args:
      direction: u.
      magnitude: w, of the same shape.
      axes: the axes of one leaf; the others are batch axes.

    Returns:
      ``u ||w|| / ||u||``, of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> rescale(jnp.array([3.0, 4.0]), jnp.array([0.0, 10.0]), axes=(0,)).tolist()
      [6.0, 8.0]
    """
    return resize(direction, norm(direction, axes), norm(magnitude, axes))


def resize(direction: jax.Array, size: jax.Array, wanted: jax.Array) -> jax.Array:
    """The direction, whose norm is ``size``, with the norm ``wanted``; zero where it is zero."""
    return direction * (wanted / jnp.where(size > 0, size, 1))


def with_momentum(
    direction: jax.Array, mu: jax.Array, count: jax.Array, b1: Scalar, nesterov: bool
) -> tuple[jax.Array, jax.Array]:
    r"""The bias-corrected mean of a leaf's directions, and the mean as it is kept.

    .. math::
      \mu \leftarrow b_1 \mu + (1 - b_1) u, \quad \hat\mu = \mu / (1 - b_1^t)

    Args:
      direction: u.
      mu: the mean so far, of the same shape.
      count: t, the number of this step, from 1.
      b1: decay of the mean, in [0, 1).
      nesterov: whether the mean looks one step ahead, as in ``optax.nadam``.

    Returns:
      The update and the new mean.
    """
    mu = b1 * mu + (1 - b1) * direction
    if nesterov:
        ahead = b1 * mu / (1 - b1 ** (count + 1))
        return ahead + (1 - b1) * direction / (1 - b1**count), mu
    return mu / (1 - b1**count), mu


class ScaleByNormalizedRmsState(NamedTuple):
    """State of ``scale_by_normalized_rms``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    nu: optax.Updates  # like the parameters, float32 at least: mean of squared normalized grads


def scale_by_normalized_rms(
    b2: Scalar, *, layout: layout_lib.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp, without bias correction, on gradients normalized leaf by leaf.

    .. math::
      n = g / (\|g\| + 10^{-25}), \quad s \leftarrow b_2 s + (1 - b_2) n^2, \quad
      w = n / (\sqrt{s} + 10^{-10})

    Args:
      b2: decay of the mean, in [0, 1]; 1 makes s the sum.
      layout: batch axes; a leaf's layers are normalized one by one.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleByNormalizedRmsState`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_normalized_rms(b2=0.75)
      >>> grads = jnp.array([3.0, -4.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates.round(3).tolist()  # of the first step: the sign by 1 / sqrt(1 - b2)
      [2.0, -2.0]
    """

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        return {'nu': jnp.zeros_like(leaf, dtype=facts.compute_dtype)}

    def update_leaf(
        grad: jax.Array, state: ScaleByNormalizedRmsState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        unit = grad / (norm(grad, facts.axes) + 1e-25)
        nu = b2 * state.nu + weight(b2) * unit * unit
        return unit / (jnp.sqrt(nu) + 1e-10), {'nu': nu}

    return leafwise.leafwise(ScaleByNormalizedRmsState, init_leaf, update_leaf, layout=layout)


class ScaleByMomentsState(NamedTuple):
    """State of ``scale_by_moments``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    mu: optax.Updates  # like the parameters, float32 at least: mean of the gradients
    nu: optax.Updates  # likewise: mean of their squares; optax.MaskedNode() for 'momentum'


def scale_by_moments(
    kind: str, b1: Scalar, b2: Scalar, *, layout: layout_lib.Layout = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction or the mean of the gradients, bias-corrected, in float32 at least.

    Args:
      kind: 'adam' or 'momentum'.
      b1: decay of the mean of the gradients, in [0, 1).
      b2: decay of the mean of their squares, in [0, 1]; 1 weighs all steps alike.
      layout: for the leaves' dtypes and paths.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleByMomentsState`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_moments('adam', b1=0.9, b2=0.99)
      >>> grads = jnp.array([3.0, -4.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates.round(3).tolist()
      [1.0, -1.0]
    """
    checks.one_of('kind', kind, ('adam', 'momentum'))

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        held = [jnp.zeros_like(leaf, dtype=facts.compute_dtype) for _ in range(2)]
        return {'mu': held[0], 'nu': held[1] if kind == 'adam' else optax.MaskedNode()}

    def update_leaf(
        grad: jax.Array, state: ScaleByMomentsState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        mu = b1 * state.mu + (1 - b1) * grad
        mu_hat = mu / (1 - b1**state.count)
        if kind == 'momentum':
            return mu_hat, {'mu': mu}
        nu = b2 * state.nu + weight(b2) * grad * grad
        held = 1 - b2**state.count  # of the weights; 0 for a sum, which has `count`
        held = jnp.where(held > 0, held, state.count)
        return adam_direction(mu_hat, nu / held), {'mu': mu, 'nu': nu}

    return leafwise.leafwise(ScaleByMomentsState, init_leaf, update_leaf, layout=layout)
