"""The reader of compiled texts, on a CPU's program and on a TPU's lines."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.compiled import collectives

# As libtpu 0.0.52 writes them for v5e (an all-reduce of norms) and v6e (asynchronous pairs).
ALL_REDUCE = """
  %all-reduce.2 = (f32[16]{0:T(128)S(1)}, f32[16]{0:T(128)S(1)}) \
all-reduce(%get-tuple-element.15, %get-tuple-element.12), channel_id=14, \
replica_groups=mesh['axis_0'=16,'axis_1'=16] {'axis_0','axis_1'}, \
use_global_device_ids=true, to_apply=%region_1.2.clone
  %fusion = f32[256,256]{1,0:T(8,128)} fusion(%copy-done, %all-reduce.2), kind=kOutput
"""
PERMUTE = """
  %collective-permute-start.5 = (bf16[16,1,2,64]{3,1,2,0:T(8,128)(2,1)S(3)}, \
bf16[16,1,2,64]{3,1,2,0:T(8,128)(2,1)S(3)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%slice.20), channel_id=6, source_target_pairs={{0,2}}, metadata={}
  %collective-permute.1 = f32[8]{0:T(128)S(1)} collective-permute(%slice.1), channel_id=5, \
source_target_pairs={{1,0},{2,1}}
  %collective-permute-done.5 = bf16[16,1,2,64]{3,1,2,0:T(8,128)(2,1)S(3)} \
collective-permute-done(%collective-permute-start.5), backend_config={}
"""


def test_an_asynchronous_pair_counts_once():
    assert collectives(PERMUTE) == [('collective-permute', 32), ('collective-permute', 4096)]
    assert collectives(ALL_REDUCE) == [('all-reduce', 128)]


def test_padding_follows_the_layout():
    # As laid out: (16, 2, 1, 64), of which the last two are padded to tiles of (8, 128).
    padded = collectives(PERMUTE, padded=True)
    assert padded == [('collective-permute', 512), ('collective-permute', 16 * 2 * 8 * 128 * 2)]
    assert collectives(ALL_REDUCE, padded=True) == [('all-reduce', 1024)]


def test_the_reader_sees_a_gather():
    """Flattening, as the authors' code does, moves the leaf."""
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(jnp.ones((512, 256)), NamedSharding(mesh, P('x', 'y')))

    def flattened(x):
        return jnp.roll(x.reshape(-1, order='F'), 1).reshape(x.shape, order='F')

    found = collectives(jax.jit(flattened).lower(x).compile().as_text())
    assert sum(size for _, size in found) > 100_000
