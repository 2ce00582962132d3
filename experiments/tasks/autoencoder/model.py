"""The network: a stack of dense layers, tanh except at the code and at the output."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import products


class Autoencoder(nnx.Module):
    """784-1000-500-250-30-250-500-1000-784 in the paper: Glorot-uniform kernels, zero biases.

    Args:
      sizes: units of the input, of the hidden layers and of the output. The narrowest hidden
        layer is the code.
      rngs: the keys.
      param_dtype: of the parameters, and so of their gradients.
      compute_dtype: of the activations; the logits are handed on in float32.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        compute_dtype: Any = jnp.float32,
    ) -> None:
        hidden = list(sizes[1:-1])
        self.linear = {hidden.index(min(hidden)), len(hidden)}  # layers without tanh
        self.depth = len(sizes) - 1
        for i in range(self.depth):
            layer = nnx.Linear(
                sizes[i],
                sizes[i + 1],
                kernel_init=nnx.initializers.glorot_uniform(),
                dtype=compute_dtype,
                param_dtype=param_dtype,
                dot_general=_product,
                rngs=rngs,
            )
            setattr(self, f'dense_{i}', layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (batch, pixels) from pixels of that shape, in [0, 1]."""
        return self.outputs(x)[-1].astype(jnp.float32)

    def outputs(self, x: jax.Array) -> list[jax.Array]:
        """What each layer hands on, of shape (batch, units)."""
        outputs = []
        for i in range(self.depth):
            x = getattr(self, f'dense_{i}')(x)
            if i not in self.linear:
                x = nnx.tanh(x)
            outputs.append(x)
        return outputs

    def constant_units(self, x: jax.Array) -> jax.Array:
        """The share of the tanh units that say nothing of these inputs, saturated at one end: the
        standard deviation of their outputs, which are in [-1, 1], is below 0.02.
        """
        units = [y for i, y in enumerate(self.outputs(x)) if i not in self.linear]
        deviations = [jnp.std(y.astype(jnp.float32), axis=0) for y in units]
        return jnp.mean(jnp.concatenate(deviations) < 0.02)


def _product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What a dense layer asks of ``lax.dot_general``."""
    return products.einsum('bi,io->bo', x, kernel)
