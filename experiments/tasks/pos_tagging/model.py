"""The network: a Transformer encoder that says a tag for each word."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks.pos_tagging import vocabulary


def positions(length: int, width: int) -> np.ndarray:
    """Fixed sinusoids of shape (length, width), as Vaswani et al. (2017), section 3.5."""
    angles = np.arange(length)[:, None] / 1e4 ** (np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width)


class Mlp(nnx.Module):
    """Two dense layers, ELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float, **keywords: Any) -> None:
        self.dense_0 = nnx.Linear(width, hidden, **keywords)
        self.dense_1 = nnx.Linear(hidden, width, **keywords)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = nnx.elu(self.dense_0(x))
        return self.dense_1(self.dropout(x, deterministic=rngs is None, rngs=rngs))


class Layer(nnx.Module):
    """Attention, then the dense layers, each after a norm and beside what came in."""

    def __init__(
        self, width: int, heads: int, qkv: int, mlp: int, dropout: float, **keywords: Any
    ) -> None:
        norm: dict[str, Any] = {name: keywords[name] for name in ('dtype', 'rngs')}
        self.attention_norm = nnx.LayerNorm(width, **norm)
        self.attention = nnx.MultiHeadAttention(
            heads,
            width,
            qkv,
            use_bias=False,
            dropout_rate=dropout,
            broadcast_dropout=False,
            decode=False,
            keep_rngs=False,
            **keywords,
        )
        self.mlp_norm = nnx.LayerNorm(width, **norm)
        self.mlp = Mlp(width, mlp, dropout, **keywords)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        off = rngs is None
        y = self.attention(self.attention_norm(x), mask=mask, deterministic=off, rngs=rngs)
        x = x + self.dropout(y, deterministic=off, rngs=rngs)
        y = self.mlp(self.mlp_norm(x), rngs)
        return x + self.dropout(y, deterministic=off, rngs=rngs)


class Tagger(nnx.Module):
    """The paper's encoder: embedding, layers, a last norm, and a Dense to the tags.

    Args:
      num_words: rows of the embedding.
      num_tags: the outputs.
      layers: how many.
      width: of the embedding and between the layers.
      heads: of the attention.
      qkv: width of queries, keys and values, of all heads together.
      mlp: hidden units of the dense layers.
      dropout: the part that is dropped in training.
      rngs: the keys of the parameters, which are float32.
      dtype: of the arithmetic, but for the logits', which is float32.
    """

    def __init__(
        self,
        num_words: int,
        num_tags: int,
        *,
        layers: int,
        width: int,
        heads: int,
        qkv: int,
        mlp: int,
        dropout: float,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ) -> None:
        keywords: dict[str, Any] = {'kernel_init': nnx.initializers.xavier_uniform()}
        keywords['rngs'] = rngs
        self.dtype, self.depth = dtype, layers
        self.embed = nnx.Embed(num_words, width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        for i in range(layers):
            layer = Layer(width, heads, qkv, mlp, dropout, dtype=dtype, **keywords)
            setattr(self, f'layer_{i}', layer)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(width, num_tags, dtype=jnp.float32, **keywords)

    def __call__(self, words: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Logits of shape (batch, length, tags), float32.

        Args:
          words: of shape (batch, length), 0 for padding, which no word attends to.
          key: of the dropout. None: there is none.
        """
        rngs = None if key is None else nnx.Rngs(dropout=key)
        mask = (words != vocabulary.PADDING)[:, None, None, :]
        x = self.dropout(self.embed(words), deterministic=rngs is None, rngs=rngs)
        x = x + jnp.asarray(positions(*x.shape[1:]), self.dtype)
        for i in range(self.depth):
            x = getattr(self, f'layer_{i}')(x, mask, rngs)
        return self.output(self.norm(x))


def drop_words(key: jax.Array, words: jax.Array, rate: float) -> jax.Array:
    """Words of which each is unknown with a probability of ``rate``, but for padding.

    So the embedding of unknown words learns something where all words of the training data are
    known, and the others do without the word at times.
    """
    dropped = jax.random.bernoulli(key, rate, words.shape) & (words != vocabulary.PADDING)
    return jnp.where(dropped, vocabulary.UNKNOWN, words)


def num_body_parameters(params: Any) -> int:
    """Parameters but for the embedding and the Dense to the tags: 18.9M in the paper's net."""
    body = {name: part for name, part in params.items() if name not in ('embed', 'output')}
    return sum(x.size for x in jax.tree.leaves(body))
