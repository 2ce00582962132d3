"""What a run computes: its start, one step, and several runs in one program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import precond_optax
from experiments import mesh as mesh_lib
from experiments import optimizers, tasks


class Carry(NamedTuple):
    """What a run needs to go on, and all that a checkpoint holds besides the clock."""

    params: Any
    opt_state: Any
    step: jax.Array  # shape=(), dtype=int32: steps taken


# From parameters, the optimizer's state and a batch, the new ones and what is told of the step:
# ``loss``, and ``grad_norm`` where the task wants it.
Step: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, jax.Array]]]


def make_tx(
    task: tasks.Task,
    config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run; floats of its config may be traced.

    In a mesh those that have kernels are told where everything lies.
    """
    inner = optimizers.make(optimizer_config, task.schedule, task.num_steps, task.layout)
    tx = optax.apply_if_finite(inner, config['max_consecutive_errors'])
    if mesh is None:
        return tx
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whose platform need not be here
        if not optimizers.has_kernels(optimizer_config):
            return tx
    return precond_optax.explicit_sharding(tx, _params_like(task, mesh))


def _params_like(task: tasks.Task, mesh: Mesh) -> Any:
    """The parameters' shapes and where they lie."""
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    places = mesh_lib.shardings(mesh, params, task.logical_axes)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )


def initial(task: tasks.Task, tx: optax.GradientTransformation, seed: int) -> Carry:
    """Parameters and state before the first step."""
    params = task.init(jax.random.fold_in(jax.random.key(seed), 0))
    return Carry(params, tx.init(params), jnp.zeros([], jnp.int32))


def shardings(task: tasks.Task, tx: optax.GradientTransformation, mesh: Mesh) -> Carry:
    """Where a run's parameters and state lie in a mesh."""
    like = _params_like(task, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    whole: Any = mesh_lib.whole(mesh)
    return Carry(places, precond_optax.state_sharding(tx, like), whole)


def make_step(
    task: tasks.Task,
    tx: optax.GradientTransformation,
    config: Mapping[str, Any] | None = None,
    places: Any = None,
) -> Step:
    """One step of training.

    Args:
      task: what is trained.
      tx: its optimizer.
      config: the task's, for ``accumulation`` and ``log_grad_norm``.
      places: the parameters' shardings, which their gradients get too.

    Returns:
      The step.
    """
    tx = optax.with_extra_args_support(tx)  # those that take no loss are not given it
    config = config or {}
    value_and_grad = gradients(task.loss, config.get('accumulation', 1), places)
    # One more pass over the gradients: not for the small tasks that never asked for it.
    norm = config.get('log_grad_norm', task.tokens_per_step > 0)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        loss, grads = value_and_grad(params, batch)
        told = {'loss': loss}
        if norm:
            told['grad_norm'] = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, told

    return step


def gradients(
    loss: Callable[[Any, Any], jax.Array], count: int, places: Any = None
) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """The loss and its gradient by the parameters, of so many microbatches one after the other.

    Both are means over the microbatches, the gradient summed in float32. A microbatch has every
    ``count``-th example, so that none leaves its device.

    Args:
      loss: a task's, see there.
      count: of microbatches.
      places: the parameters' shardings.

    Returns:
      A function of parameters and batch.
    """

    def placed(tree: Any) -> Any:
        return tree if places is None else jax.lax.with_sharding_constraint(tree, places)

    def whole(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return value, placed(grads)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)  # (8, 3) -> (2, 4, 3) for 2
        return mesh_lib.constrain(x, (None, 'batch', *(None,) * (x.ndim - 2)))

    def in_parts(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        leaves, structure = jax.tree.flatten(batch)
        parts = [split(x) if jnp.ndim(x) else jnp.broadcast_to(x, count) for x in leaves]

        def add(total: Any, part: tuple[jax.Array, list[jax.Array]]) -> tuple[Any, jax.Array]:
            own = jax.tree.unflatten(structure, part[1])
            if isinstance(own, dict):
                own = own | {'microbatch': part[0]}
            value, grads = whole(params, own)
            return placed(jax.tree.map(lambda sum_, g: sum_ + g, total, grads)), value

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params
        )
        total, values = jax.lax.scan(add, placed(zeros), (jnp.arange(count), parts))
        grads = jax.tree.map(lambda sum_, x: (sum_ / count).astype(x.dtype), total, params)
        return jnp.mean(values), grads

    return whole if count == 1 else in_parts


@dataclasses.dataclass(frozen=True)
class Program:
    """One run, or several at once; a caller need not tell them apart.

    Attributes:
      initial: the carry before the first step.
      step: for ``segments.make``.
      split: from a carry, that of each run.
      stack: the inverse of ``split``.
      shardings: where the carry lies in a mesh; None: on one device.
    """

    initial: Callable[[], Carry]
    step: Step
    split: Callable[[Carry], list[Carry]]
    stack: Callable[[Sequence[Carry]], Carry]
    shardings: Carry | None = None


def single(
    task: tasks.Task, config: Mapping[str, Any], optimizer_config: Mapping[str, Any]
) -> Program:
    """One run."""
    mesh = mesh_lib.of(config)
    tx = make_tx(task, config, optimizer_config, mesh)
    places = None if mesh is None else shardings(task, tx, mesh)
    return Program(
        initial=lambda: initial(task, tx, config['seed']),
        step=make_step(task, tx, config, None if places is None else places.params),
        split=lambda carry: [carry],
        stack=lambda carries: carries[0],
        shardings=places,
    )


def together(
    task: tasks.Task,
    config: Mapping[str, Any],
    optimizer_configs: Sequence[Mapping[str, Any]],
) -> Program:
    """Several runs by ``vmap``, which differ in floats of their optimizers' configs.

    They share the seed, so each step's batch is the same for all and not copied. ``lax.cond``
    does both branches under ``vmap``: what a method does in few steps, it does in each.

    Raises:
      ValueError: in a mesh.
    """
    if mesh_lib.of(config) is not None:
        raise ValueError('several runs in one program have one device, and no task.mesh.')
    configs = [dict(each) for each in optimizer_configs]
    varied = [n for n, value in configs[0].items() if any(c[n] != value for c in configs)]
    numbers = jnp.arange(len(configs))
    axes: Any = Carry(0, 0, None)  # type: ignore[arg-type]  # the count of steps is one for all

    def tx_of(number: jax.Array) -> optax.GradientTransformation:
        def chosen(name: str) -> jax.Array:
            # Of Python floats: traced, and yet without a dtype of its own, as in a single run.
            value = jnp.asarray(configs[0][name])
            for i, other in enumerate(configs[1:], 1):
                value = jnp.where(number == i, other[name], value)
            return value

        return make_tx(task, config, {**configs[0], **{name: chosen(name) for name in varied}})

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        def one(number: jax.Array, params: Any, opt_state: Any) -> tuple[Any, Any, Any]:
            return make_step(task, tx_of(number), config)(params, opt_state, batch)

        return jax.vmap(one)(numbers, params, opt_state)

    def start(number: jax.Array) -> Carry:
        return initial(task, tx_of(number), config['seed'])

    def split(carry: Carry) -> list[Carry]:
        carry = jax.device_get(carry)

        def run(i: int) -> Carry:
            params, opt_state = jax.tree.map(lambda x: x[i, ...], (carry.params, carry.opt_state))
            return Carry(params, opt_state, carry.step)

        return [run(i) for i in range(len(configs))]

    def stack(carries: Sequence[Carry]) -> Carry:
        params, opt_state = jax.tree.map(
            lambda *own: jnp.stack(own), *((carry.params, carry.opt_state) for carry in carries)
        )
        return Carry(params, opt_state, carries[0].step)

    return Program(
        initial=lambda: jax.vmap(start, out_axes=axes)(numbers),
        step=step,
        split=split,
        stack=stack,
    )
