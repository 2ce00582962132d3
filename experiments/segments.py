"""How a run takes its steps: in one compiled scan, or one by one with batches from the host."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import mesh as mesh_lib
from experiments import tasks
from experiments.program import Carry, Step
from experiments.telemetry import Watch

# What each step told, by name; the steps of a segment along the first axis.
Told: TypeAlias = dict[str, Any]


def _results(shardings: Carry | None) -> Any:
    """Those of a carry, so that a step gives it back where it was, and of what is told."""
    return None if shardings is None else (shardings, shardings.step)


def make_segment(task: tasks.Task, step: Step, seed: int, shardings: Carry | None = None) -> Any:
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
        batch = jax.tree.map(
            lambda x: mesh_lib.constrain(x, ('batch', *(None,) * (x.ndim - 1))), batch
        )
        params, opt_state, told = step(params, opt_state, batch)
        return (Carry(params, opt_state, count + 1), order), told

    @functools.partial(
        jax.jit,
        static_argnames='length',
        donate_argnames='carry',
        out_shardings=_results(shardings),
    )
    def segment(carry: Carry, data: Any, length: int) -> tuple[Carry, Told]:
        order = order_of(carry.step // per_epoch)
        (carry, _), told = jax.lax.scan(
            functools.partial(scanned, data), (carry, order), length=length
        )
        return carry, told

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

    def __call__(self, carry: Carry, at: int, length: int, watch: Watch) -> tuple[Carry, Told]:
        """From the carry ``at`` a step, the one ``length`` steps on, and what all steps told."""


def make(task: tasks.Task, step: Step, seed: int, shardings: Carry | None = None) -> Segments:
    """The segments of a task, by where its examples come from."""
    if task.stream is not None:
        return _Streamed(task.stream, step, shardings)
    return _Scanned(task.train_data, make_segment(task, step, seed, shardings), shardings)


def check(task: tasks.Task, mesh: Mesh | None, accumulation: int) -> None:
    """Raises ``ValueError`` for batches that cannot be divided."""
    parts = (1 if mesh is None else mesh_lib.rows(mesh)) * accumulation
    if task.batch_size % parts:
        sizes = '' if mesh is None else f'task.mesh.data * fsdp = {mesh_lib.rows(mesh)} and of '
        raise ValueError(
            f'task.batch_size must be a multiple of {sizes}task.accumulation = {accumulation}, of '
            f'their product {parts} if both are there, got {task.batch_size}.'
        )
    if task.stream is None:
        return
    _, count = mesh_lib.part(mesh)
    for like in jax.tree.leaves(list(task.stream.shapes)):
        if like.ndim and like.shape[0] * count != task.batch_size:
            raise ValueError(
                f'the stream has {like.shape[0]} examples for each of the {count} processes that '
                f'read parts of a batch, which do not make up the {task.batch_size} of a batch.'
            )


class _Scanned:
    """Examples on the device: a segment is one compiled scan."""

    def __init__(self, data: Any, segment: Any, shardings: Carry | None) -> None:
        if shardings is not None:  # each device has them all, and cuts its rows from them
            place = shardings.step
            data = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(place, np.asarray(x), x.shape),
                data,
            )
        self._data, self._segment, self._compiled = data, segment, dict[int, Any]()

    def compile(self, carry: Any, lengths: Iterable[int]) -> int:
        for length in set(lengths):
            lowered = self._segment.lower(carry, self._data, length=length)
            self._compiled[length] = lowered.compile()
        return max(map(memory, self._compiled.values()), default=0)

    def __call__(self, carry: Carry, at: int, length: int, watch: Watch) -> tuple[Carry, Told]:
        watch.before(at, length)
        carry, told = self._compiled[length](carry, self._data)
        watch.dispatched(told['loss'], length)
        return carry, told


def single_step(step: Step, shardings: Carry | None) -> Any:
    """A function of carry and batch that takes one step, jitted; the carry is donated."""

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=_results(shardings))
    def stepped(carry: Carry, batch: Any) -> tuple[Carry, Told]:
        params, opt_state, told = step(carry.params, carry.opt_state, batch)
        return Carry(params, opt_state, carry.step + 1), told

    return stepped


def placed(x: Any, mesh: Mesh, parts: int) -> jax.ShapeDtypeStruct:
    """An array of a batch as it is in a mesh, with the parts of all who read some."""
    if not x.shape:
        return jax.ShapeDtypeStruct((), x.dtype, sharding=mesh_lib.whole(mesh))
    shape = (x.shape[0] * parts, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=mesh_lib.batch(mesh))


class _Streamed:
    """Batches from the host: a compiled step for each shape that they have."""

    def __init__(self, stream: tasks.Stream, step: Step, shardings: Carry | None) -> None:
        self._stream, self._compiled = stream, dict[Any, Any]()
        self._mesh = None if shardings is None else shardings.step.mesh  # type: ignore[attr-defined]
        _, self._parts = mesh_lib.part(self._mesh)
        self._batches: Iterator[Any] = iter(())
        self._at = -1  # the step of the next of them

        self._step = single_step(step, shardings)

    @staticmethod
    def _shape(batch: Any) -> Any:
        return tuple(x.shape for x in jax.tree.leaves(batch))

    def _like(self, x: Any) -> Any:
        return x if self._mesh is None else placed(x, self._mesh, self._parts)

    def _put(self, x: Any) -> Any:
        if self._mesh is None:
            return x
        like = placed(x, self._mesh, self._parts)
        return jax.make_array_from_process_local_data(like.sharding, np.asarray(x), like.shape)

    def compile(self, carry: Any, lengths: Iterable[int]) -> int:
        if any(lengths):
            for like in self._stream.shapes:
                lowered = self._step.lower(carry, jax.tree.map(self._like, like))
                self._compiled[self._shape(like)] = lowered.compile()
        return max(map(memory, self._compiled.values()), default=0)

    def __call__(self, carry: Carry, at: int, length: int, watch: Watch) -> tuple[Carry, Told]:
        if at != self._at:
            self._batches = self._stream.batches(at)
        steps = []
        for step in range(at, at + length):
            batch = next(self._batches)
            watch.before(step, 1)
            run = self._compiled[self._shape(batch)]
            carry, told = run(carry, jax.tree.map(self._put, batch))
            watch.dispatched(told['loss'], 1)
            steps.append(told)
        self._at = at + length
        watch.finish()  # before reading, which waits for the last steps all at once
        numbers = jax.device_get(steps)
        return carry, {name: np.stack([told[name] for told in numbers]) for name in numbers[0]}
