"""Where arrays that follow a parameter lie, and what a trace is for."""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from precond_optax import placement
from precond_optax.kernels import matrix_root


def test_blocks_are_divided_as_far_as_they_go():
    """Four blocks along an axis that eight devices share: by the four, if they come first."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), (AxisType.Auto,) * 2)

    def along(names, length):
        follower = placement.Follower((length, 16), (0, None))
        return placement.along(NamedSharding(mesh, P(names)), 2, follower).spec

    assert along(('x', 'y'), 8) == P(('x', 'y'), None)
    assert along(('x', 'y'), 4) == P('x', None)
    assert along(('x', 'y'), 2) == along('x', 2) == P(None, None)
    assert along(('y', 'x'), 2) == P('y', None)


def test_what_a_trace_is_for():
    """The mesh's devices, or the process' own."""
    assert placement.platform() == 'cpu'
    of_cpus = jax.make_mesh((1,), ('data',), (AxisType.Auto,))
    with jax.set_mesh(of_cpus):
        assert placement.platform() == 'cpu'
    described = jax.sharding.AbstractDevice('TPU v5e', num_cores=1, platform='tpu')
    of_tpus = jax.sharding.AbstractMesh((1,), ('data',), abstract_device=described)
    with jax.sharding.use_abstract_mesh(of_tpus):
        assert placement.platform() == 'tpu'
        assert not matrix_root.batches_can_deadlock()
