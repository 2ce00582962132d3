"""How a leaf is seen: preconditioned or not, which axes are batch axes, and why.

The answers are static facts, taken from paths and shapes alone and worked out anew in each
trace; nothing of them is in the state.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from precond_optax import checks


@dataclasses.dataclass(frozen=True)
class LeafRule:
    """What the user asks for on the leaves that a rule names.

    Args:
      precondition: True: preconditioned, whatever its number of axes. False: the first-order
        direction (Adam's for SONew, the grafting rule's for the shared basis, Shampoo and Sketchy,
        blocks of one entry for MBAG and Block Adam). None: decided by the number of axes that are
        not batch axes, merged ones counted as one; two or more are preconditioned.
      batch_axes: how many leading axes stack separate leaves, such as scanned layers. A leaf of
        shape (layers, m, n) with ``batch_axes=1`` is treated exactly as its layers would be.
      merge_axes: groups of neighbouring axes that are seen as one, as ``reshape`` merges them;
        nothing is reshaped. ``((-2, -1),)`` sees a query kernel (d, heads, head_dim) as the
        matrix (d, heads * head_dim). Axes are those of the whole leaf, negative ones count from
        its end.
      max_size: the most entries, batch axes aside, that are preconditioned; larger leaves get the
        first-order direction. None: no limit.
      max_dim: the longest axis, merged ones as one, that is preconditioned; likewise.
      band: for SONew: the leaf's own number of off-diagonals. None: the transformation's.
      order: for SONew and MBAG: the leaf's own order of the chain, 'F' or 'C'. None: the
        transformation's.
      output_axes: for the shared basis and Block Adam: the axes of the outputs; all others but
        batch axes form the block of one output. Negative ones count from the end. None: the last
        axis, or the last merged ones.
      rank: for the shared basis and Sketchy: the leaf's own rank. None: the transformation's.
      block_size: for MBAG, Block Adam, Shampoo and Sketchy: the leaf's own. None: the
        transformation's.

    Raises:
      ValueError: if an argument is of the wrong kind.

    Example:
      >>> import precond_optax
      >>> rule = precond_optax.LeafRule
      >>> layout = {
      ...   'embed': rule(precondition=False),  # Adam's direction, for SONew
      ...   'attention/(query|key|value)': rule(merge_axes=((-2, -1),)),
      ...   'mlp': rule(band=4),
      ...   '': rule(max_dim=32768),  # all others, but for huge axes
      ... }
      >>> tx = precond_optax.sonew(1e-3, layout=layout)
    """

    precondition: bool | None = None
    batch_axes: int = 0
    merge_axes: tuple[tuple[int, ...], ...] = ()
    max_size: int | None = None
    max_dim: int | None = None
    band: int | None = None
    order: str | None = None
    output_axes: tuple[int, ...] | None = None
    rank: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.precondition is not None and not isinstance(self.precondition, bool):
            raise ValueError(
                f'precondition must be True, False or None, got {self.precondition!r}.'
            )
        checks.static_int('batch_axes', self.batch_axes, 0)
        least = {'max_size': 1, 'max_dim': 1, 'band': 0, 'rank': 1, 'block_size': 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None:
                checks.static_int(name, value, low)
        checks.one_of('order', self.order, (None, 'F', 'C'))
        if self.output_axes is not None and (not _axes(self.output_axes) or not self.output_axes):
            raise ValueError(
                'output_axes must be None or a tuple of one or more axes, such as (-1,), got '
                f'{self.output_axes!r}.'
            )
        groups = self.merge_axes
        if not isinstance(groups, tuple) or not all(
            _axes(group) and len(group) > 1 for group in groups
        ):
            raise ValueError(
                'merge_axes must be a tuple of tuples of two or more axes, such as ((-2, -1),), '
                f'got {groups!r}.'
            )


def _axes(given: Any) -> bool:
    """Whether this is a tuple of integers."""
    return isinstance(given, tuple) and all(
        isinstance(axis, int) and not isinstance(axis, bool) for axis in given
    )


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
      groups: the other axes, in groups that are seen as one.
      band, order: what the leaf's rule says of its chain; None: nothing.
      output_axes: the axes of the outputs; none where there are no axes but batch axes.
      rank, block_size: what the leaf's rule says of them; None: nothing.
      reason: why, for a reader.
      turn: in which of some steps the leaf does what is not done in each; see `leafwise`.
      stored: in an update, the dtypes of its arrays in the state, by the field's name.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    precondition: bool
    batch_axes: int
    groups: tuple[tuple[int, ...], ...]
    band: int | None
    order: str | None
    output_axes: tuple[int, ...]
    rank: int | None
    block_size: int | None
    reason: str
    turn: int = 0
    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are not batch axes."""
        return tuple(range(self.batch_axes, len(self.shape)))

    @property
    def size(self) -> int:
        """The number of entries of one of the leaves that batch axes stack."""
        return math.prod(self.shape[self.batch_axes :])

    def chain_axes(self, order: str) -> tuple[int, ...]:
        """The chain's axes, fastest first: the first for order 'F', the last for 'C'.

        In a merged group the last axis runs fastest, as in a reshape: (d, heads, head_dim) with
        the last two merged gives (0, 2, 1) for 'F' and (2, 1, 0) for 'C'.
        """
        groups = self.groups if order == 'F' else self.groups[::-1]
        return tuple(axis for group in groups for axis in reversed(group))

    @property
    def block_axes(self) -> tuple[int, ...]:
        """The axes of the entries of one output."""
        return tuple(axis for axis in self.axes if axis not in self.output_axes)

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
      ValueError: if the leaf is not of a real floating dtype of 16 bits or more, or has not the
        axes that its rule says.

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
    if len(shape) < rule.batch_axes + bool(rule.precondition):
        raise ValueError(
            f'{path}: {source} asks for batch_axes={rule.batch_axes}, precondition='
            f'{rule.precondition}, but the leaf has shape {shape}: at most '
            f'{max(0, len(shape) - bool(rule.precondition))} batch axes are allowed.'
        )
    groups = _groups(path, shape, rule, source)
    precondition, reason = _decide(shape, rule, groups, source)
    return LeafLayout(
        path=path,
        shape=shape,
        dtype=dtype,
        precondition=precondition,
        batch_axes=rule.batch_axes,
        groups=groups,
        band=rule.band,
        order=rule.order,
        output_axes=_output_axes(path, shape, rule, groups, source),
        rank=rule.rank,
        block_size=rule.block_size,
        reason=reason,
    )


def _output_axes(
    path: str,
    shape: tuple[int, ...],
    rule: LeafRule,
    groups: tuple[tuple[int, ...], ...],
    source: str,
) -> tuple[int, ...]:
    """The axes of the outputs, ascending."""
    if rule.output_axes is None:
        return groups[-1] if groups else ()
    ndim = len(shape)
    axes = sorted(axis + ndim if axis < 0 else axis for axis in rule.output_axes)
    allowed = range(rule.batch_axes, ndim)
    if len(set(axes)) < len(axes) or any(axis not in allowed for axis in axes):
        raise ValueError(
            f'{path}: {source} asks for output_axes={rule.output_axes}, but the leaf has shape '
            f'{shape} and {rule.batch_axes} batch axes: each must be one of the axes '
            f'{tuple(allowed)}, and none named twice.'
        )
    return tuple(axes)


def _groups(
    path: str, shape: tuple[int, ...], rule: LeafRule, source: str
) -> tuple[tuple[int, ...], ...]:
    """The axes that are not batch axes, those merged together."""
    ndim = len(shape)
    groups: dict[int, tuple[int, ...]] = {a: (a,) for a in range(rule.batch_axes, ndim)}
    for given in rule.merge_axes:
        axes = tuple(axis + ndim if axis < 0 else axis for axis in given)
        if axes != tuple(range(axes[0], axes[0] + len(axes))) or any(
            groups.get(axis) != (axis,) for axis in axes
        ):
            raise ValueError(
                f'{path}: {source} merges the axes {given}, but the leaf has shape {shape}: '
                'groups must be neighbouring axes in ascending order, none of them a batch axis '
                f'or in two groups; axes {rule.batch_axes} to {ndim - 1} can be merged.'
            )
        groups.update(dict.fromkeys(axes, axes))
    return tuple(dict.fromkeys(groups.values()))


def _decide(
    shape: tuple[int, ...], rule: LeafRule, groups: tuple[tuple[int, ...], ...], source: str
) -> tuple[bool, str]:
    """Whether a leaf is preconditioned, and why."""
    if 0 in shape:
        return False, 'no entries'
    if rule.precondition is False:
        return False, source
    dims = [math.prod(shape[axis] for axis in group) for group in groups]
    if rule.max_dim is not None and max(dims, default=0) > rule.max_dim:
        return False, f'axis of {max(dims)} > max_dim={rule.max_dim} ({source})'
    if rule.max_size is not None and math.prod(dims) > rule.max_size:
        return False, f'{math.prod(dims)} entries > max_size={rule.max_size} ({source})'
    if rule.precondition:
        return True, source
    seen = 'x'.join(map(str, dims)) if rule.merge_axes else f'{len(dims)}-D'
    reason = f'seen as {seen}' if rule.merge_axes else seen
    reason += f' after {rule.batch_axes} batch axes' if rule.batch_axes else ''
    return len(dims) >= 2, reason + (f' ({source})' if source else '')
