"""What each process of `test_processes.py` runs, and the training that the test runs as well.

    python -m tests.process_worker ADDRESS PROCESSES INDEX FOLDER

FOLDER holds `one/METHOD`, checkpoints saved by one process; the worker leaves `two/METHOD` and,
from process 0, `results.npz`.
"""

import pathlib
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from precond_optax import state_sharding
from tests import cases
from tests.compiled import bytes_by_device

SHAPES = {'matrix': (16, 8), '3d': (16, 2, 8), 'vector': (8,)}
# Over a mesh (4, 2); with two processes 'x' crosses from one to the other.
LAYOUTS = {
    'rows': {'matrix': P(('x', 'y')), '3d': P('x'), 'vector': P('x')},
    'columns': {'matrix': P(None, ('x', 'y')), '3d': P(None, None, 'x'), 'vector': P('y')},
    'both': {'matrix': P('x', 'y'), '3d': P('x', None, 'y'), 'vector': P(('x', 'y'))},
    'turned': {'matrix': P('y', 'x'), '3d': P(None, 'y', 'x'), 'vector': P()},
}
METHODS = ('sonew', 'sonew_band_4', 'shared_basis', 'mbag', 'soaa')  # rows of `cases.py`
BEFORE, AFTER = 3, 5  # steps before the checkpoint, and in all


def make_mesh(devices):
    """A mesh (4, 2) of all eight, or of one device alone."""
    shape = (4, 2) if len(devices) == 8 else (1, 1)
    return Mesh(np.reshape(devices, shape), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)


def tree(seed, mesh, layout):
    """The same numbers wherever they are; each process makes the pieces that it holds."""
    rng = np.random.default_rng(seed)
    whole = {k: rng.normal(size=shape).astype(np.float32) for k, shape in SHAPES.items()}
    return {
        k: jax.make_array_from_callback(
            v.shape, NamedSharding(mesh, LAYOUTS[layout][k]), lambda index, v=v: v[index]
        )
        for k, v in whole.items()
    }


def begin(method, mesh, layout):
    tx, params = cases.BY_NAME[method].make(0.1), tree(0, mesh, layout)
    shardings = state_sharding(tx, params)
    return params, jax.jit(tx.init, out_shardings=shardings)(params)


def train(method, mesh, layout, carry, steps):
    """The parameters and the state after some steps."""
    tx = cases.BY_NAME[method].make(0.1)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in steps:
        carry = step(*carry, tree(1 + number, mesh, layout))
    return carry


def share_held(carry):
    """The largest share of the bytes of all leaves with axes that a device of ours holds."""
    leaves = [leaf for leaf in jax.tree.leaves(carry) if leaf.ndim]
    return max(bytes_by_device(leaves).values()) / sum(leaf.nbytes for leaf in leaves)


def gather(carry):
    """Whole arrays in each process, by path."""
    mesh = jax.tree.leaves(carry)[0].sharding.mesh
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(carry)
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(whole)
    }


def save(path, carry):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)


def restore(path, method, mesh, layout):
    tx, params = cases.BY_NAME[method].make(0.1), tree(0, mesh, layout)
    shardings = state_sharding(tx, params)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, jax.eval_shape(tx.init, params)),
        (jax.tree.map(lambda x: x.sharding, params), shardings),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def main(address, processes, index, folder, methods):
    jax.config.update('jax_num_cpu_devices', 8 // processes)
    jax.distributed.initialize(address, processes, index)
    assert jax.process_count() == processes
    assert jax.local_device_count() == 8 // processes
    mesh, results = make_mesh(jax.devices()), {}
    for method in methods:
        for layout in LAYOUTS:
            carry = begin(method, mesh, layout)
            results[f'{method}/{layout}/share'] = share_held(carry)
            carry = train(method, mesh, layout, carry, range(BEFORE))
            results[f'{method}/{layout}/share_after'] = share_held(carry)
            for path, x in gather(carry).items():
                results[f'{method}/{layout}/{path}'] = x
            if layout == 'both':
                save(folder / 'two' / method, carry)
        carry = restore(folder / 'one' / method, method, mesh, 'rows')
        carry = train(method, mesh, 'rows', carry, range(BEFORE, AFTER))
        for path, x in gather(carry).items():
            results[f'{method}/restored/{path}'] = x
    if index == 0:
        np.savez(folder / 'results.npz', **results)


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]), sys.argv[5:])
