"""Products in a model's arithmetic: rounded once, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import products
from precond_optax import placement

SIZES = dict(b=4, t=6, d=5, n=3, h=2, i=7, o=8)
EQUATIONS = (
    'bi,io->bo',
    'btd,dnh->btnh',
    'btnh,nhd->btd',
    'btd,dh->bth',
    'ti,io->to',
    'ni,io->no',
)


def arrays(equation, dtype):
    """Operands and a cotangent of a product, of numbers that bfloat16 has."""
    key = jax.random.key(0)
    letters = equation.replace('->', ',').split(',')
    return [
        jax.random.normal(jax.random.fold_in(key, i), [SIZES[c] for c in own])
        .astype(jnp.bfloat16)
        .astype(dtype)
        for i, own in enumerate(letters)
    ]


@pytest.mark.parametrize('equation', EQUATIONS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_products_and_their_gradients(equation, dtype):
    """Against float64 sums of the same numbers: no more is lost than by one rounding."""
    x, y, bar = arrays(equation, dtype)
    out, pull = jax.vjp(lambda x, y: products.einsum(equation, x, y), x, y)
    first, rest = equation.split(',')
    second, third = rest.split('->')
    x64, y64, bar64 = (np.asarray(a, np.float64) for a in (x, y, bar))
    wanted = (
        np.einsum(equation, x64, y64),
        np.einsum(f'{third},{second}->{first}', bar64, y64),
        np.einsum(f'{first},{third}->{second}', x64, bar64),
    )
    tolerance = dict(rtol=2**-8, atol=1e-5) if dtype == 'bfloat16' else dict(rtol=1e-5, atol=1e-5)
    for found, want in zip((out, *pull(bar)), wanted, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), want, **tolerance)


def test_wider_than_their_factors():
    """A float32 product is not rounded; its cotangent is, to the factors' dtype."""
    x, y, bar = arrays('btd,dh->bth', 'bfloat16')
    out, pull = jax.vjp(lambda x, y: products.einsum('btd,dh->bth', x, y, dtype='float32'), x, y)
    want = np.einsum('btd,dh->bth', *(np.asarray(a, np.float64) for a in (x, y)))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    beyond = bar.astype(jnp.float32) * (1 + 2**-12)
    for found, same in zip(pull(beyond), pull(bar.astype(jnp.float32)), strict=True):
        assert found.dtype == 'bfloat16'
        np.testing.assert_array_equal(found, same)


def dots(dtype, equation='bi,io->bo'):
    x, y, _ = arrays(equation, dtype)
    text = str(
        jax.make_jaxpr(lambda x, y: jax.vjp(lambda *a: products.einsum(equation, *a), x, y))(x, y)
    )
    return text.count('preferred_element_type=float32'), text.count('preferred_element_type')


def test_only_bfloat16_on_cpus_asks_for_float32(monkeypatch):
    """Elsewhere, or of float32 arrays, a product is what jnp.einsum makes."""
    wide, every = dots('bfloat16')
    assert wide == every > 0
    x, y, _ = arrays('bi,io->bo', 'bfloat16')
    plain = jax.make_jaxpr(lambda x, y: jnp.einsum('bi,io->bo', x, y))(x, y)
    monkeypatch.setattr(placement, 'platform', lambda: 'tpu')
    found = jax.make_jaxpr(lambda x, y: products.einsum('bi,io->bo', x, y))(x, y)
    assert str(found) == str(plain)
