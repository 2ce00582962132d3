"""What a run computes: its start, its steps, and several runs in one program."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from experiments import optimizers, tasks


class Carry(NamedTuple):
    """What a run needs to go on, and all that a checkpoint holds besides the clock."""

    params: Any
    opt_state: Any
    step: jax.Array  # shape=(), dtype=int32: steps taken


# From parameters, the optimizer's state and a batch, the new ones and the loss.
Step: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]


def make_tx(
    task: tasks.Task, config: Mapping[str, Any], optimizer_config: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optimizer of a run; floats of its config may be traced."""
    inner = optimizers.make(optimizer_config, task.schedule, task.num_steps, task.layout)
    return optax.apply_if_finite(inner, config['max_consecutive_errors'])


def initial(task: tasks.Task, tx: optax.GradientTransformation, seed: int) -> Carry:
    """Parameters and state before the first step."""
    params = task.init(jax.random.fold_in(jax.random.key(seed), 0))
    return Carry(params, tx.init(params), jnp.zeros([], jnp.int32))


def make_step(task: tasks.Task, tx: optax.GradientTransformation) -> Step:
    """One step of training."""
    tx = optax.with_extra_args_support(tx)  # those that take no loss are not given it

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def make_segment(task: tasks.Task, step: Step, seed: int) -> Any:
    """A function of (carry, data, length) that takes ``length`` steps in one compiled scan.

    The order of the examples depends on the seed and the epoch only, never on where the run was
    cut into segments: so a resumed run sees the same batches.
    """
    per_epoch, size = task.steps_per_epoch, task.batch_size
    order_key = jax.random.fold_in(jax.random.key(seed), 1)

    def order_of(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(order_key, epoch), task.num_train)

    def scanned(data: Any, carried: tuple[Carry, jax.Array], _: None) -> Any:
        (params, opt_state, count), order = carried
        index = count % per_epoch
        order = jax.lax.cond(index == 0, lambda: order_of(count // per_epoch), lambda: order)
        rows = jax.lax.dynamic_slice_in_dim(order, index * size, size)
        batch = jax.tree.map(lambda x: x[rows], data)
        params, opt_state, loss = step(params, opt_state, batch)
        return (Carry(params, opt_state, count + 1), order), loss

    @functools.partial(jax.jit, static_argnames='length', donate_argnames='carry')
    def segment(carry: Carry, data: Any, length: int) -> tuple[Carry, jax.Array]:
        order = order_of(carry.step // per_epoch)
        (carry, _), losses = jax.lax.scan(
            functools.partial(scanned, data), (carry, order), length=length
        )
        return carry, losses

    return segment


def memory(compiled: Any) -> int:
    """Bytes that a compiled program needs: what goes in and comes out, and its workspace.

    0 where the backend does not tell.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    ends = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return ends + sizes.temp_size_in_bytes


class Segments(Protocol):
    """Takes steps, some at a time."""

    def compile(self, carry: Any, lengths: Iterable[int]) -> int:
        """Compiles what segments of these lengths need, from a carry or its shapes.

        Returns the bytes of the largest program, see `memory`.
        """

    def __call__(self, carry: Carry, at: int, length: int) -> tuple[Carry, jax.Array]:
        """From the carry ``at`` a step, the one ``length`` steps on, and all losses."""


def make_segments(task: tasks.Task, step: Step, seed: int) -> Segments:
    """The segments of a task, by where its examples come from."""
    if task.stream is not None:
        return _Streamed(task.stream, step)
    return _Scanned(task.train_data, make_segment(task, step, seed))


class _Scanned:
    """Examples on the device: a segment is one compiled scan."""

    def __init__(self, data: Any, segment: Any) -> None:
        self._data, self._segment, self._compiled = data, segment, dict[int, Any]()

    def compile(self, carry: Any, lengths: Iterable[int]) -> int:
        for length in set(lengths):
            lowered = self._segment.lower(carry, self._data, length=length)
            self._compiled[length] = lowered.compile()
        return max(map(memory, self._compiled.values()), default=0)

    def __call__(self, carry: Carry, at: int, length: int) -> tuple[Carry, jax.Array]:
        return self._compiled[length](carry, self._data)


class _Streamed:
    """Batches from the host: a compiled step for each shape that they have."""

    def __init__(self, stream: tasks.Stream, step: Step) -> None:
        self._stream, self._compiled = stream, dict[Any, Any]()
        self._batches: Iterator[Any] = iter(())
        self._at = -1  # the step of the next of them

        @functools.partial(jax.jit, donate_argnums=0)
        def stepped(carry: Carry, batch: Any) -> tuple[Carry, jax.Array]:
            params, opt_state, loss = step(carry.params, carry.opt_state, batch)
            return Carry(params, opt_state, carry.step + 1), loss

        self._step = stepped

    @staticmethod
    def _shape(batch: Any) -> Any:
        return tuple(x.shape for x in jax.tree.leaves(batch))

    def compile(self, carry: Any, lengths: Iterable[int]) -> int:
        if any(lengths):
            for like in self._stream.shapes:
                self._compiled[self._shape(like)] = self._step.lower(carry, like).compile()
        return max(map(memory, self._compiled.values()), default=0)

    def __call__(self, carry: Carry, at: int, length: int) -> tuple[Carry, jax.Array]:
        if at != self._at:
            self._batches = self._stream.batches(at)
        losses = []
        for _ in range(length):
            batch = next(self._batches)
            carry, loss = self._compiled[self._shape(batch)](carry, batch)
            losses.append(loss)
        self._at = at + length
        return carry, jnp.stack(losses)


@dataclasses.dataclass(frozen=True)
class Program:
    """One run, or several at once; a caller need not tell them apart.

    Attributes:
      initial: the carry before the first step.
      step: for `make_segments`.
      split: from a carry, that of each run.
      stack: the inverse of ``split``.
    """

    initial: Callable[[], Carry]
    step: Step
    split: Callable[[Carry], list[Carry]]
    stack: Callable[[Sequence[Carry]], Carry]


def single(
    task: tasks.Task, config: Mapping[str, Any], optimizer_config: Mapping[str, Any]
) -> Program:
    """One run."""
    tx = make_tx(task, config, optimizer_config)
    return Program(
        initial=lambda: initial(task, tx, config['seed']),
        step=make_step(task, tx),
        split=lambda carry: [carry],
        stack=lambda carries: carries[0],
    )


def together(
    task: tasks.Task,
    config: Mapping[str, Any],
    optimizer_configs: Sequence[Mapping[str, Any]],
) -> Program:
    """Several runs by ``vmap``, which differ in floats of their optimizers' configs.

    They share the seed, so each step's batch is the same for all and not copied. ``lax.cond``
    does both branches under ``vmap``: what a method does in few steps, it does in each.
    """
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

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        def one(number: jax.Array, params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
            return make_step(task, tx_of(number))(params, opt_state, batch)

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
