"""Where the state goes: beside the parameters, from the start."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from precond_optax import leafwise, placement
from precond_optax.placement import Axes


def state_sharding(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """The shardings of ``tx.init(params)`` that belong to those of the parameters.

    In a mesh with Auto axes ``jax.jit(tx.init)(params)`` holds a whole copy of the state on every
    device, for Adam as for any other; with these as its ``out_shardings`` it never does. They are
    also the target on which a checkpoint of the state is restored.

    A leaf of the state shaped like its parameter gets the parameter's sharding. One of another
    shape follows, in this package, the parameter's axes that its method names; in others
    (``optax.adafactor``, ``optax.lbfgs``) it is sharded along the axes that it has in common with
    the parameter, by their sizes, and replicated if these do not tell. What belongs to no
    parameter (counts, hyperparameters, random keys) is replicated.

    Nothing is computed and nothing allocated: ``tx.init`` is only traced.

    Args:
      tx: any transformation, chained, masked, partitioned or wrapped as it is.
      params: the parameters, ``jax.Array`` or ``jax.ShapeDtypeStruct``, with shardings: all
        ``NamedSharding`` in one mesh, or all on one and the same device.

    Returns:
      A tree of shardings with the structure of ``tx.init(params)``.

    Raises:
      ValueError: if a leaf has no such sharding or not the others' mesh, with its path; if there
        are no leaves; at a leaf that ``tx`` does not take.

    Example:
      >>> import jax, jax.numpy as jnp, precond_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ('x',))
      >>> params = jax.device_put({'kernel': jnp.ones((16, 8))}, NamedSharding(mesh, P('x')))
      >>> tx = precond_optax.sonew(1e-3)
      >>> shardings = precond_optax.state_sharding(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> state[0].mu['kernel'].sharding.spec, state[0].count.sharding.spec
      (P('x',), P())
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = leafwise.paths_of(leaves)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    replicated = _replicated(params)
    records: list[leafwise.Record] = []
    with leafwise.recording(records):
        # A function made here: a cached trace of `tx.init` would record nothing.
        state = jax.eval_shape(lambda tree: tx.init(tree), shapes)
    shardings = []
    with_paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), owner in zip(with_paths, leafwise.owners(state, shapes), strict=True):
        if owner is None:
            shardings.append(replicated)
            continue
        param_path, param = leaves[owner]
        before = path[: len(path) - len(param_path)]
        # A field's name, or its name and a number where it is a tuple of trees.
        fields = [leafwise.path_string(before[-length:]) for length in (1, 2)]
        axes = _said(records, names[owner], fields, leaf)
        shardings.append(_follow(leaf.shape, param, axes))
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def explicit_sharding(
    tx: optax.GradientTransformation, params: optax.Params
) -> optax.GradientTransformationExtraArgs:
    """A transformation that is told where its arrays lie, in a mesh with Auto axes.

    In such a mesh a program is traced without knowing what lies where, and the compiler shares it
    out afterwards. It cannot share out a Pallas kernel, so `sonew` takes its fused one only where
    an array's type tells its sharding. This makes the axes Explicit for the update. Gradients and
    state are put where `state_sharding` has them, as updates and the new state are.

    It belongs outside of all other wrappers: what ``optax.masked`` or ``optax.chain`` hand down is
    not the whole tree.

    Args:
      tx: a transformation that works in meshes with Explicit axes, as all of this package do.
      params: the parameters, ``jax.Array`` or ``jax.ShapeDtypeStruct``, with shardings, as for
        `state_sharding`. Where they are on one device, or their mesh has an axis that is not Auto,
        ``tx`` is returned.

    Returns:
      A transformation with the same state. Its update is for the inside of a jit; inside a
      ``shard_map``, whose axes are manual, it is that of ``tx``. Arrays that it gets beside
      gradients, state and parameters are the same on all devices, whole.

    Raises:
      ValueError: as `state_sharding`.

    Example:
      >>> import jax, jax.numpy as jnp, precond_optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ('x',), axis_types=(AxisType.Auto,))
      >>> params = jax.device_put({'kernel': jnp.ones((16, 8))}, NamedSharding(mesh, P('x')))
      >>> tx = precond_optax.explicit_sharding(precond_optax.sonew(1e-3), params)
      >>> shardings = precond_optax.state_sharding(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> updates['kernel'].sharding.is_equivalent_to(params['kernel'].sharding, ndim=2)
      True
    """
    inner = optax.with_extra_args_support(tx)
    anywhere = _replicated(params)
    if not isinstance(anywhere, NamedSharding) or not _is_auto(anywhere.mesh):
        return inner
    mesh = anywhere.mesh.abstract_mesh

    def specs(shardings: Any) -> Any:
        return jax.tree.map(lambda sharding: sharding.spec, shardings)

    own = specs(jax.tree.map(lambda leaf: leaf.sharding, params))
    held = specs(state_sharding(tx, params))

    def told(
        step: Callable[..., tuple[Any, Any]],
        updates: Any,
        state: Any,
        params: Any | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().manual_axes:
            return step(updates, state, params, **extra)
        leaves, structure = jax.tree.flatten(extra)
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def run(updates: Any, state: Any, params: Any, arrays: Any) -> tuple[Any, Any]:
            given = dict(zip(positions, arrays, strict=True))
            more = jax.tree.unflatten(
                structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)]
            )
            return step(updates, state, params, **more)

        arrays = [leaves[i] for i in positions]
        whole = [PartitionSpec()] * len(arrays)
        places = (own, held, own if params is not None else None, whole)
        with jax.sharding.use_abstract_mesh(mesh):
            known = jax.sharding.explicit_axes(run, in_sharding=places)
            return known(updates, state, params, arrays)

    def update(
        updates: Any, state: Any, params: Any | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        return told(inner.update, updates, state, params, **extra)

    if applied := getattr(inner.update, 'applied', None):
        update.applied = functools.partial(told, applied)  # type: ignore[attr-defined]
    return optax.GradientTransformationExtraArgs(inner.init, update)


def _is_auto(mesh: Any) -> bool:
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def _said(records: list[leafwise.Record], path: str, fields: list[str], leaf: Any) -> Axes | None:
    """The parameter's axes that a leaf of the state follows, if its method says so."""
    for record, field in itertools.product(records, fields):
        axes = record.axes.get(path, {}).get(field)
        if axes is not None and len(axes) == len(leaf.shape):
            return axes
    return None


def _replicated(params: optax.Params) -> Sharding:
    """A whole copy on each device of the parameters' mesh, after checking that there is one."""
    first: tuple[str, Sharding] | None = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, sharding = leafwise.path_string(path), getattr(leaf, 'sharding', None)
        if isinstance(sharding, NamedSharding):
            whole: Sharding = NamedSharding(sharding.mesh, PartitionSpec())
        elif isinstance(sharding, SingleDeviceSharding):
            whole = SingleDeviceSharding(next(iter(sharding.device_set)))
        else:
            raise ValueError(
                f'{name}: a {type(leaf).__name__} with sharding {sharding}; '
                'a NamedSharding or SingleDeviceSharding is needed'
            )
        first = first or (name, whole)
        if whole != first[1]:
            raise ValueError(
                f'{name}: on {_where(whole)}, but {first[0]} is on {_where(first[1])}; '
                'all parameters must be in one mesh or on one device'
            )
    if first is None:
        raise ValueError('params has no leaves, so the state has no sharding to follow')
    return first[1]


def _where(sharding: Sharding) -> str:
    return str(sharding.mesh if isinstance(sharding, NamedSharding) else sharding)


def _follow(shape: tuple[int, ...], param: Any, axes: Axes | None) -> Sharding:
    """The sharding of a leaf of this shape that belongs to ``param``."""
    sharding = param.sharding
    if axes is not None:
        return placement.along(sharding, len(param.shape), placement.Follower(shape, axes))
    if shape == param.shape or not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec) + (None,) * (len(param.shape) - len(sharding.spec))
    common = _common(shape, param.shape, spec)
    return NamedSharding(sharding.mesh, common, memory_kind=sharding.memory_kind)


def _common(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: tuple[Any, ...]
) -> PartitionSpec:
    """The parameter's spec along the axes in common, as many as can be, in the same order."""
    ndim = len(param_shape)
    if ndim and shape[-ndim:] == param_shape:  # a stack of arrays like the parameter
        return PartitionSpec(*(None,) * (len(shape) - ndim), *spec)
    for count in range(min(len(shape), ndim), 0, -1):
        found = set()
        for ours in itertools.combinations(range(len(shape)), count):
            for theirs in itertools.combinations(range(ndim), count):
                if all(shape[i] == param_shape[j] for i, j in zip(ours, theirs, strict=True)):
                    entry = {i: spec[j] for i, j in zip(ours, theirs, strict=True)}
                    found.add(tuple(entry.get(i) for i in range(len(shape))))
        if found:
            return PartitionSpec(*found.pop()) if len(found) == 1 else PartitionSpec()
    return PartitionSpec()
