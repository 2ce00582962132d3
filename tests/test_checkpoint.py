"""A state saved by Orbax is restored on another number of devices and goes on the same."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import cases, checks

CASES = (*cases.TABLE, *(cases.BY_NAME[name] for name in ('sonew_bfloat16_stats', 'sketchy')))
SHAPES = {'matrix': (16, 8), '3d': (8, 2, 8), 'vector': (8,)}


def shard(tree, count):
    """Leaves over `count` devices along their first axis."""
    mesh = jax.make_mesh(
        (count,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )

    def place(x):
        spec = P('x') if x.ndim and x.shape[0] % count == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


QUICK = {(8, 2): ('sonew', 'mbag', 'shared_basis'), (1, 8): ('sonew',)}


def pairs():
    """Rows, and numbers of devices before and after."""
    for case in CASES:
        for counts, names in QUICK.items():
            marks = () if case.name in names else pytest.mark.slow
            yield pytest.param(case, counts, marks=marks, id=f'{case.name}-{counts}')


@pytest.mark.parametrize(('case', 'counts'), list(pairs()))
def test_round_trip_on_another_device_count(case, counts, tmp_path):
    before, after = counts
    tx, whole = case.make(), checks.random_tree(0, shapes=SHAPES)
    _, state = checks.run(tx, shard(whole, before))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'state', state)
        checkpointer.wait_until_finished()
        target = shard(tx.init(whole), after)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        restored = checkpointer.restore(tmp_path / 'state', like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
    grads = checks.random_tree(7, shapes=SHAPES)
    expected, _ = tx.update(grads, jax.device_get(state), whole)
    updates, _ = jax.jit(tx.update)(shard(grads, after), restored, shard(whole, after))
    checks.assert_close(jax.device_get(updates), jax.device_get(expected), rtol=1e-4, atol=1e-5)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
