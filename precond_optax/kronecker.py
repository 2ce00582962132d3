"""What Shampoo and Sketchy share: which leaves they cut and how, and a step but for its roots."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, grafting, leafwise
from precond_optax.checks import Scalar
from precond_optax.kernels import kronecker as kernel
from precond_optax.layout import LeafLayout

# The most axes of a leaf that is preconditioned. Fields with an array for each axis are tuples of
# so many trees: the state's structure must not hang on the leaves, or `optax.tree.map_params`
# could not show `init` none.
AXES = 5


@dataclasses.dataclass(frozen=True)
class Cut:
    """How leaves are cut, by the arguments of a method.

    Attributes:
      block_size: of all leaves whose rule says nothing.
      max_dim: the longest axis of a leaf that is preconditioned.
    """

    block_size: int
    max_dim: int

    def fallback(self, facts: LeafLayout) -> str | None:
        """What a leaf gets that is not preconditioned; None where it is."""
        alone = 'grafting direction'
        if not facts.precondition:
            return alone
        if len(facts.groups) > AXES:
            return f'{alone}, {len(facts.groups)} axes > {AXES}; merge_axes makes them fewer'
        longest = max(self._blocks(facts).dims)
        if longest > self.max_dim:
            return f'{alone}, axis of {longest} > max_dim={self.max_dim}'
        return None

    def blocks(self, facts: LeafLayout) -> kernel.Blocks | None:
        """The leaf's blocks; None where it is not preconditioned."""
        return None if self.fallback(facts) else self._blocks(facts)

    def _blocks(self, facts: LeafLayout) -> kernel.Blocks:
        size = self.block_size if facts.block_size is None else facts.block_size
        return kernel.partition(facts.shape, facts.batch_axes, facts.groups, size)

    def describe(self, facts: LeafLayout, more: str = '') -> str:
        """What a leaf gets, in words."""
        blocks = self.blocks(facts)
        if blocks is None:
            return str(self.fallback(facts))
        size = 'x'.join(map(str, blocks.sizes))
        return f'{math.prod(blocks.batch)} blocks of {size}{more}, roots -1/{2 * len(blocks.dims)}'

    def cost(self, facts: LeafLayout) -> float:
        """Of a leaf's eigenproblems."""
        blocks = self.blocks(facts)
        if blocks is None:
            return 0
        return math.prod(blocks.batch) * sum(size**3 for size in blocks.sizes)


def check(
    b1: Any,
    b2: Any,
    eps: Any,
    nesterov: Any,
    block_size: Any,
    update_every: Any,
    start_step: Any,
    max_dim: Any,
    graft: grafting.Graft,
    mu_dtype: Any,
) -> None:
    """Raises ``ValueError`` unless the arguments that both methods have are in their ranges."""
    checks.in_range('b1', b1, 0, 1)
    checks.in_range('b2', b2, 0, 1, closed=True)
    checks.in_range('eps', eps, 0)
    checks.in_range('start_step', start_step, 0)
    checks.flag('nesterov', nesterov)
    for name, value in (
        ('block_size', block_size),
        ('update_every', update_every),
        ('max_dim', max_dim),
    ):
        checks.static_int(name, value, 1)
    checks.float_dtype('mu_dtype', mu_dtype)
    grafting.check(graft)


def for_each_axis(arrays: list[Any]) -> tuple[Any, ...]:
    """A leaf's part of fields with an array for each axis: ``AXES`` arrays or MaskedNode()."""
    return (*arrays, *(optax.MaskedNode() for _ in range(AXES - len(arrays))))


def correction(b2: jax.Array, count: jax.Array) -> jax.Array:
    """What the weights of so many terms of a mean of decay ``b2`` add up to; 1 for a sum.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(correction(jnp.array(b2), jnp.array(2))) for b2 in (0.5, 1.0)]
      [0.75, 1.0]
    """
    held = 1 - b2**count
    return jnp.where(held > 0, held, 1)


def make_update_leaf(  # noqa: D417 (four are those of `shampoo`)
    precondition: Callable[..., tuple[jax.Array, leafwise.Fields]],
    cut: Cut,
    b1: Scalar,
    nesterov: bool,
    graft: grafting.Graft,
    start_step: Scalar,
) -> Callable[[jax.Array, Any, LeafLayout], tuple[jax.Array, leafwise.Fields]]:
    """The update of a leaf: the direction, its size and momentum.

    Args:
      precondition: ``(grad, state, facts, blocks)`` to the direction of a leaf that is
        preconditioned and the fields that change.
      cut: which leaves are.
      b1, nesterov, graft, start_step: as in `shampoo`.

    Returns:
      What `leafwise.leafwise` takes.
    """

    def update_leaf(
        grad: jax.Array, state: Any, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        direction, blocks = state.graft, cut.blocks(facts)
        changed: leafwise.Fields = {}
        if blocks is not None:
            direction, changed = precondition(grad, state, facts, blocks)
            direction = _sized(direction, grad, state.graft, facts, state.count, graft, start_step)
        update, changed['mu'] = grafting.with_momentum(
            direction, state.mu, state.count, b1, nesterov
        )
        return update, changed

    return update_leaf


def _sized(
    direction: jax.Array,
    grad: jax.Array,
    own: jax.Array,
    facts: LeafLayout,
    count: jax.Array,
    graft: grafting.Graft,
    start_step: Scalar,
) -> jax.Array:
    """A leaf's direction with the size of the grafting rule's, or in its stead the rule's.

    Args:
      direction: of a leaf that is preconditioned.
      grad: its gradient.
      own: the rule's direction, the gradient where there is no rule.
      facts: the leaf's layout.
      count: the number of this step.
      graft: the rule.
      start_step: the steps in which the rule's direction is taken.

    Returns:
      The direction. The rule's too where no root of the leaf has any entry yet, as when its first
      gradients were zero.
    """
    if graft is not None:
        none = ~jnp.any(direction != 0, axis=facts.axes, keepdims=True)
        rootless = none & jnp.any(grad != 0, axis=facts.axes, keepdims=True)
        rescaled = grafting.rescale(direction, own, facts.axes)
        direction = jnp.where(rootless, own, rescaled)
    if checks.is_static_zero(start_step):
        return direction
    return jnp.where(count > start_step, direction, own)
