"""What each leaf gets, why, and what it costs, before anything is allocated."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from precond_optax import leafwise
from precond_optax.layout import LeafLayout


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One leaf of a `Plan`.

    Attributes:
      path: the leaf's place in the tree.
      shape: its shape.
      dtype: its dtype's name.
      treatment: what is done with it; 'not ours' if no transformation of this package sees it.
      reason: why.
      state_bytes: bytes of optimizer state shaped after this leaf.
      adam_bytes: bytes of state that ``optax.adam`` holds for it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    treatment: str
    reason: str
    state_bytes: int
    adam_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a transformation does with each leaf; ``print`` it for a table.

    Attributes:
      leaves: one `LeafPlan` for each leaf of the parameters.
      shared_bytes: bytes of state that belong to no leaf, such as step counts.
      unmatched_rules: rules of a ``layout`` that match no leaf.
    """

    leaves: tuple[LeafPlan, ...]
    shared_bytes: int
    unmatched_rules: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole optimizer state."""
        return self.shared_bytes + sum(leaf.state_bytes for leaf in self.leaves)

    @property
    def adam_bytes(self) -> int:
        """Bytes of the moments of ``optax.adam`` for the same parameters."""
        return sum(leaf.adam_bytes for leaf in self.leaves)

    def __str__(self) -> str:
        header = ('leaf', 'shape', 'dtype', 'treatment', 'why', 'state bytes', "Adam's")
        rows = [
            (
                leaf.path,
                'x'.join(map(str, leaf.shape)) or 'scalar',
                leaf.dtype,
                leaf.treatment,
                leaf.reason,
                f'{leaf.state_bytes:,}',
                f'{leaf.adam_bytes:,}',
            )
            for leaf in self.leaves
        ]
        total = ('total', '', '', '', '', f'{self.state_bytes:,}', f'{self.adam_bytes:,}')
        table = [header, *rows, total]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = [
            '  '.join(
                cell.rjust(width) if i >= 5 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        rule = '-' * max(map(len, lines))
        lines[1:1] = [rule]
        lines[-1:-1] = [rule]
        lines += [f'no leaf matches the rule {pattern!r}' for pattern in self.unmatched_rules]
        return '\n'.join(lines)


def _bytes(leaf: Any) -> int:
    return math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize


def plan(tx: optax.GradientTransformation, params: optax.Params) -> Plan:
    """What ``tx`` does with each leaf of ``params``, why, and how many bytes of state it costs.

    Nothing is computed and nothing allocated: ``tx.init`` is only traced, so the plan is that of
    the very transformation you train with, chained, masked or partitioned as it is.

    Args:
      tx: any transformation; those of this package say what they do with a leaf.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A `Plan`. Its ``state_bytes`` are those of ``tx.init(params)``.

    Raises:
      ValueError: if ``tx`` does not take a leaf, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, precond_optax
      >>> params = {'kernel': jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> table = precond_optax.plan(precond_optax.sonew(1e-3), params)
      >>> table.leaves[0].treatment, table.state_bytes, table.adam_bytes
      ('tridiagonal, 1 x 16777216, order F', 201326596, 134217728)
    """
    with_paths = jax.tree_util.tree_leaves_with_path(params)
    paths = leafwise.paths_of(with_paths)
    records: list[leafwise.Record] = []
    with leafwise.recording(records):
        # A function made here: a cached trace of `tx.init` would record nothing.
        state = jax.eval_shape(lambda tree: tx.init(tree), params)
    said: dict[str, list[tuple[LeafLayout, str]]] = {path: [] for path in paths}
    for record in records:
        for facts, treatment in record.leaves:
            said.setdefault(facts.path, []).append((facts, treatment))
    cost = [0] * len(paths)
    for leaf, owner in zip(jax.tree.leaves(state), leafwise.owners(state, params), strict=True):
        if owner is not None:
            cost[owner] += _bytes(leaf)
    total = sum(_bytes(leaf) for leaf in jax.tree.leaves(state))
    leaves = []
    for path, (_, leaf), state_bytes in zip(paths, with_paths, cost, strict=True):
        leaves.append(
            LeafPlan(
                path=path,
                shape=jnp.shape(leaf),
                dtype=jnp.result_type(leaf).name,
                treatment=' + '.join(text for _, text in said[path]) or 'not ours',
                reason=' + '.join(facts.reason for facts, _ in said[path]),
                state_bytes=state_bytes,
                adam_bytes=2 * _bytes(leaf),
            )
        )
    for path in list(said)[len(set(paths)) :]:
        for facts, treatment in said[path]:
            why = f'{facts.reason}; made of leaves by a wrapper'
            leaves.append(LeafPlan(path, facts.shape, facts.dtype.name, treatment, why, 0, 0))
    unmatched = tuple(pattern for record in records for pattern in record.unmatched)
    return Plan(tuple(leaves), total - sum(cost), unmatched)
