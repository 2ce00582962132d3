"""The plumbing, once: a transformation of trees from what a method says about one leaf.

``leafwise`` walks the tree, finds each leaf's layout, counts the steps, casts to the
arithmetic's dtype and back to what is stored, runs the grafting rule, and puts the results
together again. A method that needs sums over all leaves says so in a ``Whole``.
``chain_learning_rate`` makes the alias. A method file holds its state, its rule
for a leaf and its docstring, and nothing of this.
"""

import collections
import contextlib
import contextvars
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks
from precond_optax import layout as layout_lib
from precond_optax.kernels import matrix_root
from precond_optax.kernels.rounding import stochastic_round
from precond_optax.kernels.verbs import Move
from precond_optax.layout import LeafLayout
from precond_optax.placement import Axes

# A leaf's state: by field, an array, a tuple of arrays (a stacked field) or optax.MaskedNode().
Fields = dict[str, Any]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Whole:
    """What a method does for the tree as a whole: numbers of it, and sums over its leaves.

    A tree without leaves has no sums and keeps its numbers.

    Attributes:
      start: the state's fields that are one number for the tree, and what they are at first.
      before: from a gradient, the leaf's state and its layout, as ``update_leaf`` sees them,
        numbers by name. Summed over the leaves, before any is updated, they are the fourth
        argument of ``update_leaf``.
      after: from the state before the step (but ``count`` is this step's), the sums of what
        ``update_leaf`` gives as ``changed['sums']``, and the extra arguments of ``update``, the
        numbers that change.
    """

    start: Mapping[str, float]
    before: Callable[[jax.Array, Any, LeafLayout], Mapping[str, jax.Array]]
    after: Callable[[Any, Mapping[str, jax.Array], Mapping[str, Any]], Mapping[str, jax.Array]]


class Record(NamedTuple):
    """What one transformation says in its ``init``, for `plan`."""

    leaves: list[tuple[LeafLayout, str]]  # each leaf's layout and treatment
    axes: dict[str, Mapping[str, Axes]]  # by path and field: the parameter's axes that it follows
    unmatched: list[str]  # the rules that no leaf matches


_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    'precond_optax_records', default=None
)


@contextlib.contextmanager
def recording(records: list[Record] | None) -> Iterator[None]:
    """Collects into ``records`` what each leafwise ``init`` inside the block says; None: not."""
    token = _records.set(records)
    try:
        yield
    finally:
        _records.reset(token)


def path_string(path: Path) -> str:
    """A leaf's path as rules and messages write it: 'encoder/0/kernel'; '(root)' if empty."""
    return jax.tree_util.keystr(path, simple=True, separator='/') or '(root)'


def paths_of(with_paths: Sequence[tuple[Path, Any]]) -> list[str]:
    """The paths of a tree's leaves as rules and messages write them.

    Boxes around arrays, as Flax puts them, are no part of a path: ``nnx.Optimizer`` hands them to
    ``init``, but not to ``update``.
    """
    # A box holds one array; of a tuple's query, key and value none is a box.
    beside = collections.Counter(path[:-1] for path, _ in with_paths)

    def is_boxed(path: Path) -> bool:
        named = path[-1:] == (jax.tree_util.GetAttrKey('value'),)
        return named and len(path) > 1 and beside[path[:-1]] == 1

    return [path_string(path[:-1] if is_boxed(path) else path) for path, _ in with_paths]


def owners(state: optax.OptState, params: optax.Params) -> list[int | None]:
    """For each leaf of a state, the number of the parameter that it belongs to, or None.

    States mirror the parameters' tree, so that is the one whose path ends the leaf's. Where there
    are several, it is the longest whose place mirrors the tree: all leaves there are at
    parameters' paths, as they are not at the numbers of a tuple of trees. A scalar belongs to
    scalars alone. (``optax.tree.map_params`` hands ``init`` a tree without leaves, which
    ``optax.lbfgs`` does not take, having to read a dtype.)
    """
    with_paths = jax.tree_util.tree_leaves_with_path(params)
    numbers = {path: number for number, (path, _) in enumerate(with_paths)}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    mirrors: dict[Any, bool] = {}
    for path, _ in leaves:
        for start in range(len(path) + 1):
            place = path[:start]
            mirrors[place] = mirrors.get(place, True) and path[start:] in numbers
    found: list[int | None] = []
    for path, leaf in leaves:
        ends = [start for start in range(len(path) + 1) if path[start:] in numbers]
        starts = [start for start in ends if mirrors[path[:start]]] or ends
        owner = numbers[path[starts[0] :]] if starts else None
        # Such as the count beside parameters that are one array, whose path is empty, or an
        # injected hyperparameter of a parameter's name.
        if owner is not None and not jnp.shape(leaf) and jnp.shape(with_paths[owner][1]):
            owner = None
        found.append(owner)
    return found


def _leaves(tree: Any, layout: layout_lib.Layout) -> tuple[list[Any], list[LeafLayout], Any]:
    """The leaves, their layouts and the tree's structure."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in with_paths]
    layouts = [
        layout_lib.leaf_layout(path, leaf, layout)
        for path, leaf in zip(paths_of(with_paths), leaves, strict=True)
    ]
    return leaves, layouts, treedef


def preconditioned(tree: Any, layout: layout_lib.Layout) -> Any:
    """For each leaf of a tree, whether it is preconditioned: a mask for ``optax.masked``."""
    _, layouts, treedef = _leaves(tree, layout)
    return treedef.unflatten([facts.precondition for facts in layouts])


def staggered(costs: Sequence[float], every: int) -> list[int]:
    """The turns, out of ``every``, of leaves of given costs: dearest first, to the idlest turn.

    Example:
      >>> staggered([1, 5, 4, 0, 1], every=2)
      [1, 0, 1, 1, 0]
    """
    load, turns = [0.0] * every, [0] * len(costs)
    for leaf in sorted(range(len(costs)), key=lambda i: -costs[i]):
        turns[leaf] = min(range(every), key=load.__getitem__)
        load[turns[leaf]] += costs[leaf]
    return turns


def is_turn(count: jax.Array, every: int, turn: jax.Array) -> jax.Array:
    """Whether a leaf does in this step what is not done in each: in the first one, all do.

    Example:
      >>> [bool(is_turn(count, every=3, turn=1)) for count in range(1, 7)]
      [True, True, False, False, True, False]
    """
    return (count == 1) | ((count - 1) % every == turn)


def turns_taken(count: jax.Array, every: int, turn: jax.Array) -> jax.Array:
    """In how many of the steps up to ``count`` it was a leaf's turn, as `is_turn` has it.

    Example:
      >>> [int(turns_taken(count, every=3, turn=1)) for count in range(1, 7)]
      [1, 2, 2, 2, 3, 3]
    """
    return 1 + (count - 1 + (every - turn) % every) // every


def leafwise(
    state_type: type,
    init_leaf: Callable[[Any, LeafLayout], Fields],
    update_leaf: Callable[..., tuple[jax.Array, Fields]],
    *,
    apply_leaf: Callable[..., tuple[jax.Array, Fields] | None] | None = None,
    layout: layout_lib.Layout,
    stacked: Mapping[str, int] | None = None,
    stochastic: Collection[str] = (),
    gathered: Mapping[str, bool] | None = None,
    one_by_one: str | None = None,
    whole: Whole | None = None,
    graft: optax.GradientTransformation | None = None,
    describe: Callable[[LeafLayout], str] = lambda facts: '',
    axes: Callable[[LeafLayout], Mapping[str, Axes]] = lambda facts: {},
    every: int = 1,
    cost: Callable[[LeafLayout], float] = lambda facts: facts.size,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of trees from an init and an update of one leaf.

    The state is a ``state_type``: ``count`` first, then fields that mirror the parameters' tree,
    and ``graft``, the grafting rule's own state, where the method grafts.

    Args:
      state_type: the method's NamedTuple.
      init_leaf: from a leaf (array or ``ShapeDtypeStruct``) and its layout, its fields.
      update_leaf: from a gradient, the leaf's state and its layout, the update and the fields that
        change. The leaf's state is a ``state_type`` too: ``count`` is the number of this step,
        from 1; a field is the leaf's array, in the arithmetic's dtype; ``graft`` is the grafting
        rule's update for this leaf; a gathered field is the leaf's number, one of ``whole`` the
        tree's.
      apply_leaf: of the same, the parameter, as it is, and how it moves along the update, a
        `Move`: the new parameter and the fields that change, in fewer passes over memory than
        ``update_leaf`` and a sum; None where it has no better way.
      layout: the user's rules.
      stacked: fields that are tuples of trees, each like the parameters', and how many.
      stochastic: fields that are rounded stochastically where they are stored in bfloat16.
      gathered: fields with one number for each leaf, and whether they are kept: a float32 vector
        in the order of the leaves, or ``optax.MaskedNode()``.
      one_by_one: a gathered field whose number, never negative, a leaf waits for before the next
        one begins, where batched decompositions `matrix_root.batches_can_deadlock`. None: the
        compiler may do several leaves at once.
      whole: what the method does for the tree as a whole. None: leaves know nothing of each other.
      graft: the grafting rule; its updates reach ``update_leaf``. None: the gradient does.
      describe: what a leaf gets, for `plan`.
      axes: the axes of the fields that are not shaped like the parameter: for each the
        parameter's axis that it follows, or None; for `state_sharding`. By the field's name, and
        its place where it is stacked: 'roots/1'.
      every: in how many steps a leaf does once what is not done in each; the leaves take turns,
        ``facts.turn`` is the leaf's, from 0, so that the steps cost about the same.
      cost: what a leaf's turn costs, in any unit; 0: it has none.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` that ignores unknown extra arguments.
      Its update has an attribute ``moving``, for `chain_learning_rate`.
    """
    layout_lib.check(layout)
    kept = dict(gathered or {})
    start = {} if whole is None else whole.start
    names = tuple(n for n in state_type._fields if n not in ('count', 'graft', *kept, *start))  # type: ignore[attr-defined]
    has_graft = 'graft' in state_type._fields  # type: ignore[attr-defined]
    depth = {name: (stacked or {}).get(name) for name in names}
    rule = optax.with_extra_args_support(optax.identity() if graft is None else graft)

    def leaves_of(tree: Any) -> tuple[list[Any], list[LeafLayout], Any]:
        leaves, layouts, treedef = _leaves(tree, layout)
        turns = staggered([cost(facts) for facts in layouts], every)
        with_turns = zip(layouts, turns, strict=True)
        return leaves, [dataclasses.replace(f, turn=turn) for f, turn in with_turns], treedef

    def init(params: optax.Params) -> Any:
        leaves, layouts, treedef = leaves_of(params)
        records = _records.get()
        if records is not None:
            records.append(
                Record(
                    [(facts, describe(facts)) for facts in layouts],
                    {facts.path: axes(facts) for facts in layouts},
                    layout_lib.unmatched_rules(layouts, layout),
                )
            )
        per_leaf = [init_leaf(leaf, facts) for leaf, facts in zip(leaves, layouts, strict=True)]
        with recording(None):  # a grafting rule of ours is no treatment of its own
            others = {'graft': rule.init(params)} if has_graft else {}
        for name, on in kept.items():
            others[name] = jnp.zeros(len(leaves), jnp.float32) if on else optax.MaskedNode()
        others.update((name, jnp.array(x, _widest(layouts))) for name, x in start.items())
        trees = _to_trees(per_leaf, depth, treedef)
        return state_type(count=jnp.zeros([], jnp.int32), **others, **trees)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        return walk(updates, state, params, None, extra_args)

    def walk(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None,
        moves: Sequence[Move] | None,
        extra_args: Mapping[str, Any],
    ) -> tuple[optax.Updates, Any]:
        """The updates, or the parameters after such moves along them; and the new state."""
        grads, layouts, treedef = leaves_of(updates)
        _check_alike(layouts, treedef, state, state_type)
        grads = [jnp.asarray(grad) for grad in grads]
        updates = treedef.unflatten(grads)
        count = optax.safe_increment(state.count)
        per_leaf, others = _to_leaves(state, depth, treedef), {}
        layouts = [
            dataclasses.replace(facts, stored=_dtypes(fields))
            for facts, fields in zip(layouts, per_leaf, strict=True)
        ]
        wide = [_cast(f, facts.compute_dtype) for f, facts in zip(per_leaf, layouts, strict=True)]
        if has_graft:
            tree, others['graft'] = rule.update(updates, state.graft, params, **extra_args)
            for fields, facts, own in zip(wide, layouts, treedef.flatten_up_to(tree), strict=True):
                fields['graft'] = own.astype(facts.compute_dtype)
        others.update((name, getattr(state, name)) for name in (*kept, *start))
        numbers: dict[str, list[Any]] = {name: [] for name, on in kept.items() if on}
        for i, (fields, facts) in enumerate(zip(wide, layouts, strict=True)):
            fields.update({n: others[n][i] if on else None for n, on in kept.items()})
            fields.update(_cast({n: others[n] for n in start}, facts.compute_dtype))
        seen = [
            (grad.astype(facts.compute_dtype), state_type(count=count, **fields), facts)
            for grad, fields, facts in zip(grads, wide, layouts, strict=True)
        ]
        sums = _sums([] if whole is None else [whole.before(*leaf) for leaf in seen], layouts)
        results, reported, last = [], [], None
        targets = _targets(params, moves, layouts, treedef) if moves else []
        for i, (wide_grad, own, facts) in enumerate(seen):
            if last is not None:
                wide_grad = matrix_root.once(last, wide_grad)
            more = () if whole is None else (_cast(sums, facts.compute_dtype),)
            new, changed = step(wide_grad, own, facts, more, *(targets[i] if targets else ()))
            reported.append(changed.pop('sums', {}))
            results.append(new if targets else new.astype(grads[i].dtype))
            last = last if one_by_one is None else changed.get(one_by_one, last)
            for name, values in numbers.items():
                values.append(changed.pop(name, getattr(own, name)))
            per_leaf[i].update(_cast_like(changed, per_leaf[i], stochastic, count, facts.path))
        others.update((name, jnp.array(values, jnp.float32)) for name, values in numbers.items())
        if whole is not None and seen:
            now = state._replace(count=count)
            for name, value in whole.after(now, _sums(reported, layouts), extra_args).items():
                others[name] = jnp.asarray(value, others[name].dtype)
        trees = _to_trees(per_leaf, depth, treedef)
        return treedef.unflatten(results), state_type(count=count, **others, **trees)

    def step(
        grad: jax.Array,
        own: Any,
        facts: LeafLayout,
        more: Any,
        param: Any = None,
        move: Any = None,
    ) -> tuple[jax.Array, Fields]:
        if move is None:
            return update_leaf(grad, own, facts, *more)
        applied = apply_leaf and apply_leaf(grad, own, facts, *more, param, move)
        if applied is not None:
            return applied
        direction, changed = update_leaf(grad, own, facts, *more)
        return move(param.astype(facts.compute_dtype), direction).astype(param.dtype), changed

    update.moving = walk  # type: ignore[attr-defined]
    return optax.GradientTransformationExtraArgs(init, update)


def _targets(
    params: Any, moves: Sequence[Move], layouts: Sequence[LeafLayout], treedef: Any
) -> list[tuple[jax.Array, Move]]:
    """Each parameter and how it moves; ``ValueError`` if they are not as the gradients are."""
    try:
        leaves = [jnp.asarray(leaf) for leaf in treedef.flatten_up_to(params)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'the parameters are not the tree that the gradients are: {jax.tree.structure(params)}'
            f' in place of {treedef}.'
        ) from error
    for leaf, facts in zip(leaves, layouts, strict=True):
        if leaf.shape != facts.shape:
            raise ValueError(
                f'{facts.path}: the parameter has shape {leaf.shape}, the gradient {facts.shape}.'
            )
    return list(zip(leaves, moves, strict=True))


def _check_alike(layouts: Sequence[LeafLayout], treedef: Any, state: Any, wanted: type) -> None:
    """Raises ``ValueError`` if these are not the gradients that the state is for."""
    if not isinstance(state, wanted):
        raise ValueError(f'the state must be a {wanted.__name__}, got a {type(state).__name__}.')
    if not hasattr(state, 'mu'):  # which is as the parameters are, in all methods
        return  # a grafting rule, whose method has looked
    means = state.mu
    try:
        held = treedef.flatten_up_to(means)
    except (ValueError, TypeError) as error:
        there = set(paths_of(jax.tree_util.tree_leaves_with_path(means)))
        given = {facts.path for facts in layouts}
        what = [f'{path} is missing' for path in sorted(there - given)]
        what += [f'{path} is not in the state' for path in sorted(given - there)]
        told = '; '.join(what[:4]) or f'{treedef} in place of {jax.tree.structure(means)}'
        raise ValueError(
            f'the gradients are not the tree that the state was made for: {told}.'
        ) from error
    for facts, mean in zip(layouts, held, strict=True):
        shapes = {jnp.shape(x) for x in jax.tree.leaves(mean)}
        if shapes - {facts.shape}:
            raise ValueError(
                f'{facts.path}: the gradient has shape {facts.shape}, but the state was made for '
                f'{", ".join(map(str, shapes))}.'
            )


def _widest(layouts: Sequence[LeafLayout]) -> jnp.dtype:
    """The dtype of what belongs to no single leaf: the widest arithmetic, float32 at least."""
    return jnp.result_type(jnp.float32, *(facts.compute_dtype for facts in layouts))


def _sums(
    per_leaf: Sequence[Mapping[str, jax.Array]], layouts: Sequence[LeafLayout]
) -> dict[str, jax.Array]:
    """The leaves' numbers by name, added up; of no leaves, none."""
    dtype = _widest(layouts)
    return {
        name: sum((numbers[name].astype(dtype) for numbers in per_leaf), jnp.zeros([], dtype))
        for name in (per_leaf[0] if per_leaf else ())
    }


def _to_trees(per_leaf: list[Fields], depth: Mapping[str, int | None], treedef: Any) -> Fields:
    """From the leaves' fields to fields that are trees, or tuples of trees where stacked."""

    def tree(name: str, k: int | None) -> Any:
        return treedef.unflatten([f[name] if k is None else f[name][k] for f in per_leaf])

    return {
        name: tree(name, None) if count is None else tuple(tree(name, k) for k in range(count))
        for name, count in depth.items()
    }


def _to_leaves(state: Any, depth: Mapping[str, int | None], treedef: Any) -> list[Fields]:
    """The inverse of ``_to_trees``."""
    per_leaf: list[Fields] = [{} for _ in range(treedef.num_leaves)]
    for name, count in depth.items():
        field = getattr(state, name)
        columns = [treedef.flatten_up_to(tree) for tree in ((field,) if count is None else field)]
        for i, fields in enumerate(per_leaf):
            values = tuple(column[i] for column in columns)
            fields[name] = values[0] if count is None else values
    return per_leaf


def _dtypes(fields: Fields) -> dict[str, Any]:
    """In which each field of a leaf is stored; of a stacked one, its first array."""
    arrays = {name: jax.tree.leaves(value) for name, value in fields.items()}
    return {name: jnp.result_type(held[0]) for name, held in arrays.items() if held}


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    """All arrays of a small tree in ``dtype``."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def rounding_key(path: str, name: str, place: int, count: jax.Array) -> jax.Array:
    """The key of a stochastic rounding: anew in each step, the same in a resumed run.

    Args:
      path: of the leaf.
      name: of the state's field.
      place: of the array, where the field is stacked; 0 elsewhere.
      count: the number of this step.

    Returns:
      A key.
    """
    key = jax.random.fold_in(jax.random.key(zlib.crc32(f'{path}:{name}'.encode())), place)
    return jax.random.fold_in(key, count)


def _cast_like(
    changed: Fields, fields: Fields, stochastic: Collection[str], count: jax.Array, path: str
) -> Fields:
    """The changed fields in the dtypes in which they are stored."""

    def cast(name: str, new: jax.Array, old: jax.Array, place: int) -> jax.Array:
        # What a method's own kernel has rounded stays.
        if name not in stochastic or old.dtype != jnp.bfloat16 or new.dtype == old.dtype:
            return new.astype(old.dtype)
        key = rounding_key(path, name, place, count)
        return stochastic_round(key, new.astype(jnp.float32))

    stored = {}
    for name, value in changed.items():
        places = itertools.count()
        stored[name] = jax.tree.map(
            lambda new, old, name=name, places=places: cast(name, new, old, next(places)),
            value,
            fields[name],
        )
    return stored


def chain_learning_rate(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """An alias: the direction, decoupled weight decay, the learning rate and the sign.

    A weight decay that is the number 0 needs no parameters in ``update``, as ``optax.adam``
    needs none; the state is the same with and without.
    """
    checks.learning_rate(learning_rate)
    if not callable(weight_decay):
        checks.in_range('weight_decay', weight_decay, 0)
    decays = not checks.is_static_zero(weight_decay)
    decay = optax.add_decayed_weights(weight_decay) if decays else optax.identity()
    if mask is not None:
        decay = optax.masked(decay, mask)
    scale = optax.scale_by_learning_rate(learning_rate)
    chained = optax.chain(direction, decay, scale)

    def moves_of(grads: Any, decay_state: Any, scale_state: Any) -> list[Move]:
        """What decay and learning rate make of each parameter and its direction."""
        rate = learning_rate(scale_state.count) if callable(learning_rate) else learning_rate
        if not decays:
            return [Move(1.0, -rate)] * len(jax.tree.leaves(grads))
        own = decay_state if mask is None else decay_state.inner_state
        strength = weight_decay(own.count) if callable(weight_decay) else weight_decay
        chosen = mask(grads) if callable(mask) else True if mask is None else mask
        each = jax.tree.map(lambda on, part: jax.tree.map(lambda _: on, part), chosen, grads)
        keeps = [1 - rate * strength if on else 1.0 for on in jax.tree.leaves(each)]
        return [Move(keep, -rate) for keep in keeps]

    def applied(grads: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
        """The parameters after a step, and the new state."""
        own, *others = state
        moves = moves_of(grads, *others)
        # Of these two the counts alone are looked at: nothing is computed.
        _, others = optax.chain(decay, scale).update(grads, tuple(others), params)
        params, own = moving(grads, own, params, moves, extra_args)
        return params, (own, *others)

    moving = direction.update.moving
    chained.update.applied = applied
    return chained
