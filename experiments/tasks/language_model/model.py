"""The network: a decoder that says the next token.

Pre-norm, with RMSNorm, rotary positions, gated MLPs (SwiGLU) and no biases. The parameters of all
layers are stacked along a first axis and the layers are one scan. Parameters keep their dtype, the
arithmetic is in another; norms, softmax and logits are float32.

Shapes are spelled with B rows, T tokens in a row, D features, N heads, K of them for keys and
values, H features of a head, F hidden units of an MLP, V tokens in the vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import mesh, products

_FEATURES = ('batch', 'length', 'features')
_HEADS = ('batch', 'length', 'heads', 'head_dim')

# What is kept of a layer's forward pass for the backward pass; None: all of it.
REMAT: Mapping[str, Callable[..., Any] | None] = {
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ('auto', 'xla', 'cudnn')

_EPS = 1e-6  # of RMSNorm


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A network; see ``configs/tasks/language_model.py`` for the fields.

    ``end`` is the token that ends a document where attention stops there; None: it does not.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab_size: int
    tied: bool = True
    qk_norm: bool = True
    rotary_base: float = 10_000.0
    attention: str = 'auto'
    remat: str = 'none'
    compute_dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    end: int | None = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def _normal(
    rngs: nnx.Rngs, sizes: Sizes, axes: Sequence[str], shape: Sequence[int], std: float
) -> nnx.Param:
    """A parameter that knows the names of its axes, see ``mesh.RULES``."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(sizes.param_dtype), axes=tuple(axes))


def _scale(sizes: Sizes, axis: str, length: int) -> nnx.Param:
    """The scale of a norm."""
    return nnx.Param(jnp.ones(length, sizes.param_dtype), axes=(axis,))


def rms_norm(x: jax.Array, scale: Any) -> jax.Array:
    """An array over the root of its mean square along the last axis, times the scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + _EPS)
    return (y * scale[...]).astype(x.dtype)


def rotation(length: int, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of shape (T, 1, H / 2), Su et al. (2021), equation (34).

    Feature i of the first half and feature i of the second are a pair, which place t turns by
    t * base ** (-2 i / H).
    """
    rates = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads of shape (B, T, N, H), turned by their places."""
    cos, sin = turns
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def same_document(tokens: jax.Array, end: int) -> jax.Array:
    """Which places are in one document: of shape (B, 1, T, T), bool.

    The token that ends a document is the first of the next one, which it foretells.
    """
    document = jnp.cumsum(tokens == end, axis=-1)
    return document[:, None, :, None] == document[:, None, None, :]


def _implementation(sizes: Sizes) -> Any:
    """What ``jax.nn.dot_product_attention`` is asked for; cuDNN takes 16-bit floats alone."""
    if sizes.attention != 'auto':
        return sizes.attention
    fits = sizes.compute_dtype == jnp.bfloat16 and sizes.head_dim % 8 == 0
    # '9.0' on NVIDIA's, which need 8.0 for it; no number, or none at all, on what has no cuDNN.
    capability = getattr(jax.devices()[0], 'compute_capability', '')
    major = capability.partition('.')[0]
    there = major.isdecimal() and int(major) >= 8
    return 'cudnn' if fits and sizes.head_dim <= 128 and there else 'xla'


class Attention(nnx.Module):
    """Causal attention after a norm: what it adds to (B, T, D)."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        width, inner = sizes.width, sizes.head_dim
        inward = ('embed', 'heads', 'head_dim')
        self.scale = _scale(sizes, 'embed', width)

        def kernel(heads: int) -> nnx.Param:
            return _normal(rngs, sizes, inward, (width, heads, inner), width**-0.5)

        self.query = kernel(sizes.heads)
        self.key, self.value = kernel(sizes.kv_heads), kernel(sizes.kv_heads)
        std = (sizes.heads * inner * 2 * sizes.layers) ** -0.5
        outward = ('heads', 'head_dim', 'embed')
        self.out = _normal(rngs, sizes, outward, (sizes.heads, inner, width), std)
        if sizes.qk_norm:
            self.query_scale = _scale(sizes, 'head_dim', inner)
            self.key_scale = _scale(sizes, 'head_dim', inner)

    def __call__(
        self, x: jax.Array, turns: tuple[jax.Array, jax.Array], mask: jax.Array | None
    ) -> jax.Array:
        y = rms_norm(x, self.scale)

        def heads(kernel: nnx.Param) -> jax.Array:
            projected = products.einsum('btd,dnh->btnh', y, kernel.astype(y.dtype))
            return mesh.constrain(projected, _HEADS)

        query, key, value = heads(self.query), heads(self.key), heads(self.value)
        if self.sizes.qk_norm:
            query, key = rms_norm(query, self.query_scale), rms_norm(key, self.key_scale)
        attended = jax.nn.dot_product_attention(
            rotate(query, turns),
            rotate(key, turns),
            value,
            mask=mask,
            is_causal=True,
            implementation=_implementation(self.sizes),
        )
        attended = mesh.constrain(attended, _HEADS)
        return products.einsum('btnh,nhd->btd', attended, self.out.astype(y.dtype))


class Mlp(nnx.Module):
    """SwiGLU after a norm, Shazeer (2020): what it adds to (B, T, D)."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        width, hidden = sizes.width, sizes.mlp
        self.scale = _scale(sizes, 'embed', width)
        inward = (('embed', 'mlp'), (width, hidden), width**-0.5)
        self.gate = _normal(rngs, sizes, *inward)
        self.up = _normal(rngs, sizes, *inward)
        std = (hidden * 2 * sizes.layers) ** -0.5
        self.down = _normal(rngs, sizes, ('mlp', 'embed'), (hidden, width), std)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = rms_norm(x, self.scale)
        gate, up, down = (kernel.astype(y.dtype) for kernel in (self.gate, self.up, self.down))
        into, out = 'btd,df->btf', 'btf,fd->btd'
        hidden = jax.nn.silu(products.einsum(into, y, gate)) * products.einsum(into, y, up)
        return products.einsum(out, mesh.constrain(hidden, ('batch', 'length', 'mlp')), down)


class Layer(nnx.Module):
    """Attention, then the MLP, each beside what came in."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.attention = Attention(sizes, rngs)
        self.mlp = Mlp(sizes, rngs)

    def __call__(
        self, x: jax.Array, turns: tuple[jax.Array, jax.Array], mask: jax.Array | None
    ) -> jax.Array:
        x = mesh.constrain(x + self.attention(x, turns, mask), _FEATURES)
        return mesh.constrain(x + self.mlp(x), _FEATURES)


class Decoder(nnx.Module):
    """Embedding, layers, a last norm, and the logits of the next token.

    Kernels are normal with variance 1 / inputs, those that add to the residual stream with a
    further 1 / (2 layers). Entries of the embedding have variance 1 / D. They come in as they are:
    times sqrt(D), as some do, a tied output would say each token again, at a loss of 20 and more.
    """

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        shape, std = (sizes.vocab_size, sizes.width), sizes.width**-0.5
        self.embedding = _normal(rngs, sizes, ('vocab', 'embed'), shape, std)

        @nnx.split_rngs(splits=sizes.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(sizes, rngs)

        self.layers = stacked(rngs)
        self.final_scale = _scale(sizes, 'embed', sizes.width)
        if not sizes.tied:
            self.output = _normal(rngs, sizes, ('embed', 'vocab'), shape[::-1], std)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From tokens of shape (B, T), logits of shape (B, T, V), float32."""
        sizes = self.sizes
        tokens = mesh.constrain(tokens, ('batch', 'length'))
        # Gathered over the axes that cut its features, so that looking up moves no activations.
        table = mesh.constrain(self.embedding.astype(sizes.compute_dtype), ('vocab', 'features'))
        x = mesh.constrain(table[tokens], _FEATURES)
        x = self.run(x, None if sizes.end is None else same_document(tokens, sizes.end))
        x = rms_norm(x, self.final_scale)
        kernel = table.T if sizes.tied else self.output.astype(x.dtype)
        logits = products.einsum('btd,dv->btv', x, kernel, dtype=jnp.float32)
        return mesh.constrain(logits, ('batch', 'length', 'vocab'))

    def run(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The layers, one after the other, in one scan."""
        sizes = self.sizes
        turns = rotation(x.shape[1], sizes.head_dim, sizes.rotary_base)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, own)(x, turns, mask), None

        if (policy := REMAT[sizes.remat]) is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jax.lax.scan(layer, x, stacked)[0]


def init(sizes: Sizes, key: jax.Array) -> Any:
    """The parameters: a nested dict."""
    return nnx.to_pure_dict(nnx.state(Decoder(sizes, nnx.Rngs(params=key)), nnx.Param))


def forward(sizes: Sizes) -> Callable[[Any, jax.Array], jax.Array]:
    """A function from parameters and tokens to logits."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(sizes, nnx.Rngs(0))))
    return lambda params, tokens: nnx.merge(graphdef, params)(tokens)


def shapes(sizes: Sizes) -> Any:
    """The parameters' shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda key: init(sizes, key), jax.random.key(0))


def logical_axes(sizes: Sizes) -> Any:
    """A tree like the parameters' of the names of their axes."""
    network = nnx.eval_shape(lambda: Decoder(sizes, nnx.Rngs(0)))
    found: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        names = variable.get_metadata('axes')
        *folders, name = map(str, path)
        node = found
        for part in folders:
            node = node.setdefault(part, {})
        node[name] = ('layers', *names) if path[0] == 'layers' else names
    return found


def flops_per_token(sizes: Sizes, length: int) -> float:
    """Floating point operations of a training step, forward and backward, for each token.

    6 x parameters in products + 12 x layers x heads x head_dim x length, as PaLM's appendix B
    (Chowdhery et al., 2022): two for a product and a sum in the forward pass, twice that in the
    backward pass. Parameters in products are all kernels and the output, whether it is the
    embedding or not; looking up the embedding and the norms' scales are not counted. Attention
    is counted in full, not halved for being causal. What rematerialisation computes again is
    not counted.
    """
    inner = sizes.head_dim
    attention = 2 * sizes.width * inner * (sizes.heads + sizes.kv_heads)
    kernels = sizes.layers * (attention + 3 * sizes.width * sizes.mlp)
    products = kernels + sizes.width * sizes.vocab_size
    return 6.0 * products + 12.0 * sizes.layers * sizes.heads * inner * length
