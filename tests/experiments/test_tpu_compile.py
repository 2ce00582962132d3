"""The driver of the TPU compiler, on CPU devices and without libtpu."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from experiments import tpu_compile
from precond_optax import placement
from tests.compiled import border


@pytest.fixture
def params():
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    kernel = NamedSharding(mesh, P(None, 'data', 'model'))
    return {
        'layers/kernel': jax.ShapeDtypeStruct((3, 16, 8), jnp.float32, sharding=kernel),
        'scale': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P('data'))),
    }


def test_a_border_is_the_faces_of_a_shard(params):
    # A shard is (3, 4, 4): two faces of 3 * 4 entries along either sharded axis.
    assert border(params['layers/kernel']) == 4 * 2 * (12 + 12)
    assert border(params['scale']) == 4 * 2


def test_a_step_is_measured_and_shown(params):
    facts = {
        'adam': tpu_compile.measure(optax.adam(1e-3), params),
        'sonew': tpu_compile.measure(precond_optax.sonew(1e-3), params),
    }
    # Of the kernel 48 entries on one device, of the scale 2; the count is one integer.
    assert facts['adam'].arguments == 4 * 4 * (48 + 2) + 4
    assert facts['adam'].moved == 0
    assert facts['sonew'].arguments == facts['adam'].arguments + 4 * 48
    assert 0 < facts['sonew'].moved <= facts['sonew'].padded
    leaves = {'sonew': {'layers/kernel': facts['sonew']}}
    assert '| (3, 4, 4) |' in tpu_compile.leaf_table(leaves, params)
    assert '| sonew ' in tpu_compile.language_model_table(facts)
    assert '| sonew ' in tpu_compile.traffic_table(facts)


def test_sonew_is_xla_s_even_on_a_tpu(monkeypatch):
    """Where 'auto' would take the kernel, which has rows of its own."""
    monkeypatch.setattr(placement, 'platform', lambda: 'tpu')
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    leaf = jnp.ones((64, 256))
    for tx, has_kernel in (
        (tpu_compile.optimizers([1])['sonew, band 1'](), False),
        (precond_optax.sonew(1e-3), True),
    ):
        program = str(jax.make_jaxpr(tx.update)(leaf, tx.init(leaf), leaf))
        assert ('pallas_call' in program) == has_kernel


def test_the_bands_are_factories():
    made = tpu_compile.optimizers([0, 1])
    assert list(made) == ['adam', 'sonew, band 0', 'sonew, band 1']
    assert len(made['sonew, band 1']().init(jnp.ones((2, 2)))[0].offdiag) == 1
