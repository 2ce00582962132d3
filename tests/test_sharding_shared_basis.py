"""What moves in a sharded step of the shared basis: (k, b) or (k, m) at most, no coefficients.

Where devices share out the block, they share out the outputs' coefficients as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax import LeafRule
from tests import quick
from tests.compiled import collectives

RANK, FLOAT = 8, 4
FIELDS = ('basis', 'coefficients', 'residual', 'root')
# Shape, rule; the specs of the parameter; those that basis, coefficients, rho and roots then have.
XY, YX = ('x', 'y'), ('y', 'x')
MATRIX, HEADS, LAYERS = (512, 256), (64, 8, 32), (8, 64, 32)
CASES = [
    (MATRIX, {}, P('x', 'y'), (P(None, 'x'), P(YX, None), P(YX), P(YX, None))),
    (MATRIX, {}, P('y', 'x'), (P(None, 'y'), P(XY, None), P(XY), P(XY, None))),
    (MATRIX, {}, P(XY), (P(None, XY), P(XY, None), P(XY), P(XY, None))),
    (
        MATRIX,
        {},
        P(None, ('x', 'y')),
        (P(None, None), P(('x', 'y'), None), P(('x', 'y')), P(('x', 'y'), None)),
    ),
    (
        HEADS,
        {'merge_axes': ((-2, -1),)},
        P('y', 'x', None),
        (P(None, 'y'), P(XY, None, None), P(XY, None), P(XY, None, None)),
    ),
    (
        LAYERS,
        {'batch_axes': 1},
        P('x', None, 'y'),
        (P('x', None, None), P('x', 'y', None), P('x', 'y'), P('x', 'y', None)),
    ),
    (
        LAYERS,
        {'batch_axes': 1},
        P(None, 'x', 'y'),
        (P(None, None, 'x'), P(None, YX, None), P(None, YX), P(None, YX, None)),
    ),
    # The four devices along the block divide neither axis of the outputs.
    (
        (64, 6, 6),
        {'merge_axes': ((-2, -1),)},
        P('x', None, 'y'),
        (P(None, 'x'), P(None, 'y', None), P(None, 'y'), P(None, 'y', None)),
    ),
]


def step_on_a_mesh(shape, rule, spec, kind, **keywords):
    """The compiled update of a leaf, its parameter and its state."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        tx = precond_optax.scale_by_shared_basis(
            rank=RANK, layout={'': LeafRule(**rule)}, **keywords
        )
        shardings = precond_optax.state_sharding(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        eager = tx.init(params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
    return compiled, params, (shardings, eager, compiled.output_shardings[1])


@pytest.mark.parametrize(
    ('shape', 'rule', 'spec', 'expected', 'root'),
    [
        *quick.every(2, [(*case, 'auto') for case in CASES]),
        *quick.every(2, [(*case, 'newton_schulz') for case in CASES], first=1),
    ],
)
def test_no_coefficients_move(shape, rule, spec, expected, root):
    compiled, params, states = step_on_a_mesh(shape, rule, spec, AxisType.Auto, root=root)
    for state in states:
        for field, wanted in zip(FIELDS, expected, strict=True):
            held = getattr(state, field)
            held = held if isinstance(held, NamedSharding) else held.sharding
            ndim = len(wanted)
            like = NamedSharding(held.mesh, wanted)
            assert held.is_equivalent_to(like, ndim), (field, held.spec, wanted)
    check(collectives(compiled.as_text()), params, rule)


@pytest.mark.parametrize(('shape', 'rule', 'spec', 'expected'), quick.every(2, CASES))
def test_explicit_meshes_move_no_more(shape, rule, spec, expected):
    compiled, params, states = step_on_a_mesh(shape, rule, spec, AxisType.Explicit)
    for state in states:
        for field, wanted in zip(FIELDS, expected, strict=True):
            held = getattr(state, field)
            held = held if isinstance(held, NamedSharding) else held.sharding
            assert held.is_equivalent_to(NamedSharding(held.mesh, wanted), len(wanted)), field
    check(collectives(compiled.as_text()), params, rule)


def check(found, params, rule):
    """Sums over sharded axes; gathered are the basis, for its QR, and coordinates of blocks."""
    batch = rule.get('batch_axes', 0)
    shard = params.sharding.shard_shape(params.shape)
    block = params.shape[batch]
    layers = shard[0] if batch else 1
    basis = layers * RANK * block * FLOAT
    outputs = int(np.prod(shard[batch + 1 :]))
    coordinates = layers * RANK * outputs * FLOAT
    assert {kind for kind, _ in found} <= {'all-reduce', 'all-gather'}
    gathered = sorted(size for kind, size in found if kind == 'all-gather')
    summed = [size for kind, size in found if kind == 'all-reduce']
    block_is_sharded = shard[batch] < block
    vectors = layers * (4 * RANK * RANK + 8 * outputs + 16) * FLOAT
    if not block_is_sharded:
        assert not gathered
    else:  # the basis once
        assert gathered.count(basis) >= 1
        gathered.remove(basis)
    # The basis once; the blocks' coordinates in the old basis, in the new one and outside both,
    # with norms and k x k numbers.
    assert sum(gathered) <= 3 * coordinates + vectors
    assert sum(summed) <= basis + 3 * coordinates * block_is_sharded + vectors
    # No coefficients among it, which are `RANK` times as large as the coordinates.
    assert max(summed + gathered) < max(basis + vectors, coordinates * RANK)
