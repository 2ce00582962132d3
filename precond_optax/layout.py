"""How a leaf is seen: preconditioned or not, which axes are batch axes, and why.

The answers are static facts, taken from paths and shapes alone and worked out anew in each
trace; nothing of them is in the state.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LeafRule:
    """What the user asks for on the leaves that a rule names.

    Args:
      precondition: True: preconditioned, whatever its shape. False: the first-order direction
        (Adam's for SONew). None: decided by the number of axes that are not batch axes; two or
        more are preconditioned.
      batch_axes: how many leading axes stack separate leaves, such as scanned layers. A leaf of
        shape (layers, m, n) with ``batch_axes=1`` is treated exactly as its layers would be.

    Raises:
      ValueError: if an argument is of the wrong kind.
    """

    precondition: bool | None = None
    batch_axes: int = 0

    def __post_init__(self) -> None:
        if self.precondition is not None and not isinstance(self.precondition, bool):
            raise ValueError(
                f'precondition must be True, False or None, got {self.precondition!r}.'
            )
        is_int = isinstance(self.batch_axes, int) and not isinstance(self.batch_axes, bool)
        if not is_int or self.batch_axes < 0:
            raise ValueError(f'batch_axes must be an integer >= 0, got {self.batch_axes!r}.')


# Rules by path: regular expressions that are searched for in the leaf's path, first match wins;
# or a function of the path and the leaf's shape and dtype, None for "decide by the shape".
LayoutFn: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], LeafRule | None]
Layout: TypeAlias = Mapping[str, LeafRule] | LayoutFn | None


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """The static facts of one leaf.

    Attributes:
      path: the leaf's place in the tree, as 'encoder/0/kernel'.
      shape: its shape.
      dtype: its dtype.
      precondition: whether it is preconditioned.
      batch_axes: the number of leading batch axes.
      reason: why, for a reader.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    precondition: bool
    batch_axes: int
    reason: str

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are not batch axes."""
        return tuple(range(self.batch_axes, len(self.shape)))

    def chain_axes(self, order: str) -> tuple[int, ...]:
        """The chain's axes, fastest first: the first for order 'F', the last for 'C'."""
        return self.axes if order == 'F' else self.axes[::-1]

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The arithmetic's dtype: float32 at least, float64 for float64 leaves."""
        return jnp.promote_types(self.dtype, jnp.float32)


def check(layout: Layout) -> None:
    """Raises ``ValueError`` unless ``layout`` is rules by path, a function, or None."""
    if layout is None or callable(layout):
        return
    if not isinstance(layout, Mapping):
        raise ValueError(
            'layout must be None, a mapping from regular expressions to LeafRule, or a function '
            f'(path, leaf) -> LeafRule or None; got {layout!r}.'
        )
    for pattern, rule in layout.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f'layout: {pattern!r} is not a regular expression: {error}.'
            ) from error
        if not isinstance(rule, LeafRule):
            raise ValueError(f'layout[{pattern!r}] must be a LeafRule, got {rule!r}.')


def _rule_for(path: str, leaf: jax.ShapeDtypeStruct, layout: Layout) -> tuple[LeafRule, str]:
    """The rule that holds for a leaf and where it comes from."""
    if layout is None:
        return LeafRule(), ''
    if isinstance(layout, Mapping):
        for pattern, rule in layout.items():
            if re.search(pattern, path):
                return rule, f'rule {pattern!r}'
        return LeafRule(), ''
    given = layout(path, leaf)
    if given is not None and not isinstance(given, LeafRule):
        raise ValueError(f'{path}: layout must return a LeafRule or None, got {given!r}.')
    return (LeafRule(), '') if given is None else (given, 'layout function')


def unmatched_rules(layouts: Iterable[LeafLayout], layout: Layout) -> list[str]:
    """The patterns that no leaf's path matches: most often a slip of the pen."""
    if not isinstance(layout, Mapping):
        return []
    paths = [facts.path for facts in layouts]
    return [p for p in layout if not any(re.search(p, path) for path in paths)]


def leaf_layout(path: str, leaf: Any, layout: Layout) -> LeafLayout:
    """The static facts of one leaf.

    Args:
      path: the leaf's path.
      leaf: an array, a ``ShapeDtypeStruct`` or a number.
      layout: the user's rules.

    Returns:
      The leaf's ``LeafLayout``.

    Raises:
      ValueError: if the leaf is not of a real floating dtype of 16 bits or more, or has fewer
        axes than its rule says.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> leaf = jax.ShapeDtypeStruct((12, 64, 32), jnp.float32)
      >>> leaf_layout('blocks/kernel', leaf, {'^blocks/': LeafRule(batch_axes=1)}).axes
      (1, 2)
    """
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    # Eight-bit floats take no part in JAX's promotion: cast them before the optimizer.
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ValueError(
            f'{path}: leaves must be of a real floating dtype of 16 bits or more, got '
            f'{dtype.name} of shape {shape}. Leave others out by optax.masked or optax.partition.'
        )
    rule, source = _rule_for(path, jax.ShapeDtypeStruct(shape, dtype), layout)
    ndim = len(shape) - rule.batch_axes
    if ndim < 0 or (rule.precondition and ndim < 1):
        raise ValueError(
            f'{path}: {source} asks for batch_axes={rule.batch_axes}, precondition='
            f'{rule.precondition}, but the leaf has shape {shape}: at most '
            f'{max(0, len(shape) - bool(rule.precondition))} batch axes are allowed.'
        )
    if 0 in shape:
        precondition, reason = False, 'no entries'
    elif rule.precondition is not None:
        precondition, reason = rule.precondition, source
    else:
        precondition = ndim >= 2
        reason = f'{ndim}-D' + (f' after {rule.batch_axes} batch axes' if rule.batch_axes else '')
        reason += f' ({source})' if source else ''
    return LeafLayout(path, shape, dtype, precondition, rule.batch_axes, reason)
