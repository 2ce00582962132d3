"""What the GPU compiler makes of a step, by `experiments/gpu_compile.py`; nothing runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import precond_optax
from experiments import gpu_compile, tpu_compile

pytestmark = pytest.mark.gpu_compile


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip('jax_cuda12_plugin')


def leaf_of(shape, gpu, dtype=jnp.float32):
    mesh = Mesh(gpu_compile.devices(gpu), ('data',), axis_types=(AxisType.Auto,))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


def measured(tx, leaf):
    """Bytes for each entry: moved, and needed beside arguments."""
    facts = tpu_compile.measure(tx, leaf)
    return facts.traffic / leaf.size, facts.temporary / leaf.size


@pytest.mark.parametrize('gpu', gpu_compile.TARGETS)
@pytest.mark.parametrize('band', [0, 1, 2, 4])
def test_one_pass_moves_what_it_must(gpu, band):
    """Read are g m d e, written m d e u; then u and p read and p written; and strips' ends."""
    leaf = leaf_of((8192, 4096), gpu)
    traffic, temporary = measured(
        precond_optax.sonew(1e-3, mean_eps=None, band=band, impl='pallas'), leaf
    )
    least = 8 * (3 + band) + 12
    print(f'{gpu}, band {band}: {traffic:.2f} ({least}), temporary {temporary:.2f}')
    # A band's rows of each array are read, written and read again at both ends of 128 rows.
    assert least <= traffic <= least + 3 * 4 * 2 * (3 + band) * band / 128 + 0.3
    assert temporary <= 4 + 4 * 2 * (3 + band) * band / 128 + 0.1


@pytest.mark.parametrize('keywords', [{'graft': None}, {'delayed_graft': True}])
@pytest.mark.parametrize('band', [0, 1, 4])
def test_parameters_are_moved_in_the_pass(band, keywords):
    """Read are g m d e p, written m d e p; and strips' ends."""
    leaf = leaf_of((8192, 4096), 'h200')
    traffic, temporary = measured(
        precond_optax.sonew(1e-3, mean_eps=None, band=band, impl='pallas', **keywords), leaf
    )
    least = 8 * (3 + band) + 4
    print(f'band {band}, {keywords}: {traffic:.2f} ({least}), temporary {temporary:.2f}')
    assert least <= traffic <= least + 3 * 4 * 2 * (4 + band) * band / 128 + 0.3
    assert temporary <= 4 * 2 * (4 + band) * band / 128 + 0.2


@pytest.mark.parametrize('band', [1, 4])
def test_relative_damping_is_another_pass_that_reads(band):
    leaf = leaf_of((8192, 4096), 'h200')
    tx = precond_optax.sonew(1e-3, mean_eps=None, band=band, relative_eps=1e-4, impl='pallas')
    traffic, temporary = measured(tx, leaf)
    least = 8 * (3 + band) + 12 + 4 * (2 + band)
    print(f'relative, band {band}: {traffic:.2f} ({least}), temporary {temporary:.2f}')
    assert least <= traffic <= 1.12 * least


@pytest.mark.parametrize(('band', 'least'), [(1, 32), (4, 44)])
def test_a_state_in_bfloat16_halves_it(band, least):
    leaf = leaf_of((8192, 4096), 'h200')
    low = dict(mu_dtype='bfloat16', stats_dtype='bfloat16')
    tx = precond_optax.sonew(1e-3, mean_eps=None, band=band, impl='pallas', **low)
    traffic, _ = measured(tx, leaf)
    print(f'bfloat16, band {band}: {traffic:.2f} ({least})')
    assert least <= traffic <= 1.15 * least


@pytest.mark.parametrize('shape', [(1000, 257), (7, 3, 5), (1, 4), (300, 1)])
def test_any_matrix_compiles(shape):
    tx = precond_optax.sonew(1e-3, impl='pallas', relative_eps=1e-4, nesterov=True)
    assert 'triton' in tpu_compile.compile_step(tx, leaf_of(shape, 'h200')).as_text()


def test_auto_is_xla():
    """Until the kernel has run on a GPU."""
    text = tpu_compile.compile_step(precond_optax.sonew(1e-3), leaf_of((512, 512), 'h200'))
    assert 'triton' not in text.as_text()


def test_adam_is_seen_as_it_is():
    leaf = leaf_of((8192, 4096), 'h200')
    traffic, _ = measured(tpu_compile.optimizers([1])['adam'](), leaf)
    assert traffic == pytest.approx(28, rel=1e-3)
