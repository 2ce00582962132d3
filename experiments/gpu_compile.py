"""GPUs that need not be there, for which the GPU compiler compiles; nothing runs.

That needs jax's CUDA plugin and nvidia's compiler, no driver, no GPU: the extra 'gpu-compile'.
"""

import jax
from jax.experimental import topologies

_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {capability} }}
  core_count: {cores}
  fpus_per_core: {arithmetic}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {cache}
  shared_memory_per_core: {shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {opted}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
_HOPPER = dict(
    capability=9,
    cores=132,
    arithmetic=128,
    clock=1.98,
    cache=52428800,
    shared=233472,
    opted=232448,
)
# What XLA asks of a GPU, in units of bytes, seconds and GHz.
TARGETS = {
    'a100': dict(
        name='NVIDIA A100-SXM4-80GB',
        capability=8,
        cores=108,
        arithmetic=64,
        clock=1.41,
        bandwidth=2039 * 10**9,
        memory=80 * 2**30,
        cache=41943040,
        shared=167936,
        opted=166912,
    ),
    'h100': _HOPPER
    | dict(name='NVIDIA H100 80GB HBM3', bandwidth=3352 * 10**9, memory=80 * 2**30),
    'h200': _HOPPER | dict(name='NVIDIA H200', bandwidth=4800 * 10**9, memory=141 * 10**9),
}


def devices(name: str) -> list[jax.Device]:
    """One GPU to compile for.

    Args:
      name: a key of `TARGETS`.

    Returns:
      A device of a topology, in a list.

    Raises:
      RuntimeError: if jax's CUDA plugin is not installed.
    """
    target = _TARGET.format(**TARGETS[name])
    try:
        described = topologies.get_topology_desc(
            name, 'cuda', target_config=target, topology='1x1x1'
        )
    except NotImplementedError as error:
        raise RuntimeError(
            f'{name} wants the CUDA plugin: pip install precond_optax[gpu-compile]'
        ) from error
    return list(described.devices)
