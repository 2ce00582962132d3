"""What the compiler makes of a sharded step: only borders move."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from precond_optax.kernels import banded
from tests import quick
from tests.compiled import border, collectives

# Every way to put the mesh's axes on the axes of a leaf, both on one or one on each.
WAYS = {
    (512, 256): [
        P('x', 'y'),
        P('y', 'x'),
        P(('x', 'y')),
        P(None, ('x', 'y')),
        P('x'),
        P(None, 'y'),
    ],
    (16, 32, 64): [
        *(P(*axes) for axes in itertools.permutations(('x', 'y', None))),
        P(('x', 'y')),
        P(None, ('x', 'y')),
        P(None, None, ('x', 'y')),
    ],
}
CASES = [
    (shape, spec, order, band)
    for shape, specs in WAYS.items()
    for spec in specs
    for order, band in (('F', 1), ('C', 1), ('F', 4))
]


def compiled_step(shape, spec, kind=AxisType.Auto, **keywords):
    """What the compiled update of a leaf moves, and the bytes of the leaf's border."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind,) * 2)
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones(shape), sharding)
        tx = precond_optax.scale_by_sonew(**keywords)
        state = tx.init(params)
        assert all(x.sharding == params.sharding for x in jax.tree.leaves(state) if x.ndim)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    return collectives(text), border(params)


def check(found, edge, band, relative=False):
    """Only borders and numbers: in all (band + 2) borders, each ``band`` deep, of both sides."""
    assert {kind for kind, _ in found} == {'collective-permute', 'all-reduce'}
    norms = [size for kind, size in found if kind == 'all-reduce']
    permutes = [size for kind, size in found if kind == 'collective-permute']
    # The mean and the graft's two norms, summed along one mesh axis and then along the other.
    assert sum(norms) <= 2 * (12 + 4 * relative)
    assert sum(norms) + sum(permutes) <= (band + 2) * (edge * band)
    # In single steps of one face: of g, m and psi z by band; of a by band, of e^1 by one less ...
    steps = 3 * band + band * (band + 1) // 2 + band * relative
    assert sum(permutes) <= steps * edge // 2


@pytest.mark.parametrize(('shape', 'spec', 'order', 'band'), quick.every(2, CASES))
def test_only_borders_move(shape, spec, order, band):
    check(*compiled_step(shape, spec, order=order, band=band), band)


@pytest.mark.parametrize('shape', WAYS)
@pytest.mark.parametrize('band', [1, 4])
def test_only_borders_move_in_explicit_meshes(shape, band):
    check(*compiled_step(shape, P('x', 'y'), AxisType.Explicit, band=band), band)


def test_only_borders_move_with_relative_eps():
    found = compiled_step((512, 256), P('x', 'y'), band=4, relative_eps=1e-4)
    check(*found, band=4, relative=True)


def test_many_bands_move_borders_as_well():
    band = banded.MAX_UNROLLED + 1
    check(*compiled_step((64, 32), P('x', 'y'), band=band), band=band)


def test_diagonal_moves_norms_alone():
    found, _ = compiled_step((512, 256), P('x', 'y'), band=0)
    assert {kind for kind, _ in found} == {'all-reduce'}
    assert sum(size for _, size in found) <= 24
