"""Whether a leaf goes through a kernel, and how it is called.

XLA cannot share out a kernel among devices, vmap would put a batch axis to its scalars, and
nothing can be differentiated through it.
"""

from collections.abc import Callable
from typing import Any

import jax

from precond_optax import placement

# 'pallas': leaves that can go through a kernel do; 'xla': none does; 'auto': the first on TPUs.
IMPLS = ('auto', 'xla', 'pallas')


def is_wanted(impl: str) -> bool:
    """Whether leaves that can are to go through a kernel, by what a trace is for."""
    return impl == 'pallas' or (impl == 'auto' and placement.platform() == 'tpu')


def is_placed(impl: str, leaf: jax.Array) -> bool:
    """Whether it is known where a leaf lies, so that each device can run a kernel on its part."""
    # With several devices and no mesh in sight the compiler may yet share it out.
    guessed = jax.typeof(leaf).sharding.mesh.empty and jax.device_count() > 1
    return placement.has_known_parts(leaf) and (impl == 'pallas' or not guessed)


def is_alone(impl: str, leaf: jax.Array) -> bool:
    """Whether a leaf lies on one device, as far as is known: for kernels that know no parts."""
    own = jax.typeof(leaf).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if own.empty else own
    return is_placed(impl, leaf) and (mesh.empty or mesh.size == 1)


def guarded(run: Callable[..., Any], method: str) -> Callable[..., Any]:
    """``run``, which calls a kernel: one after the other under vmap, with clear errors.

    Args:
      run: of arrays.
      method: whose it is, for the errors.

    Returns:
      A function of the same.
    """
    guarded = jax.custom_batching.custom_vmap(run)

    @guarded.def_vmap
    def one_by_one(size: int, mapped: Any, *args: Any) -> tuple[Any, Any]:
        along = jax.tree.map(lambda own: 0 if own else None, mapped)
        pairs = zip(jax.tree.leaves(args), jax.tree.leaves(mapped), strict=True)
        if any(own and jax.typeof(x).sharding.spec[0] is not None for x, own in pairs):
            raise NotImplementedError(
                f'{method} through its kernel under a vmap whose axis the mesh shares out: pass '
                "impl='xla'."
            )
        results = jax.vmap(jax.custom_batching.sequential_vmap(run), along, axis_size=size)(*args)
        return results, jax.tree.map(lambda _: True, results)

    outer = jax.custom_jvp(guarded)

    @outer.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"an update of {method} cannot be differentiated through its kernel: pass impl='xla'."
        )

    return outer
