"""The autoencoder's parts: network, loss, schedule, data."""

import gzip
import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tasks import autoencoder as config
from experiments import tasks
from experiments.tasks.autoencoder import data, loss


@pytest.fixture(scope='module')
def paper_task():
    task_config = config.get_config()
    task_config.source, task_config.batch_size = 'synthetic', 64
    return tasks.make(task_config, None)


def test_network_is_the_papers():
    """784-1000-500-250-30-250-500-1000-784: 2.84M parameters, Glorot-uniform, zero biases."""
    from flax import nnx

    from experiments.tasks.autoencoder import model

    sizes = (784, *config.get_config().hidden, 784)
    network = model.Autoencoder(sizes, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_837_314
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        kernel, bias = params[f'dense_{i}']['kernel'], params[f'dense_{i}']['bias']
        assert kernel.shape == (rows, columns)
        bound = np.sqrt(6 / (rows + columns))
        assert 0.95 * bound < float(jnp.abs(kernel).max()) <= bound
        assert not np.any(bias)

    # The same forward pass in NumPy: tanh but at the code (fourth) and at the output (eighth).
    x = np.random.default_rng(0).random((5, 784))
    y = x
    for i in range(8):
        layer = params[f'dense_{i}']
        y = y @ np.asarray(layer['kernel'], np.float64) + np.asarray(layer['bias'])
        y = y if i in (3, 7) else np.tanh(y)
    np.testing.assert_allclose(network(jnp.asarray(x, jnp.float32)), y, rtol=1e-4, atol=1e-4)


def test_parameters_and_gradients_in_bfloat16():
    """And the activations where they are asked for; the loss is close, and float32."""
    found = {}
    for param_dtype, compute_dtype in itertools.product(('float32', 'bfloat16'), repeat=2):
        task_config = config.get_config()
        task_config.update(
            source='synthetic',
            hidden=(8, 3, 8),
            batch_size=64,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        task = tasks.make(task_config, None)
        params = task.init(jax.random.key(0))
        value, grads = jax.value_and_grad(task.loss)(params, task.train_data[:64])
        assert {x.dtype.name for x in jax.tree.leaves((params, grads))} == {param_dtype}
        assert value.dtype == 'float32'
        text = str(jax.make_jaxpr(task.loss)(params, task.train_data[:64]))
        assert ('bf16[64,8] = tanh' in text) == (compute_dtype == 'bfloat16')
        found[param_dtype, compute_dtype] = float(value)
    for dtype in ('float32', 'bfloat16'):  # the parameters that are drawn are not the same
        exact, low = found[dtype, 'float32'], found[dtype, 'bfloat16']
        assert 0 < abs(low - exact) < 1e-3 * exact


def test_loss_is_summed_over_pixels_and_mean_over_the_batch():
    rng = np.random.default_rng(0)
    logits, pixels = rng.normal(size=(3, 5)), rng.random((3, 5))
    p = 1 / (1 + np.exp(-logits))
    expected = -(pixels * np.log(p) + (1 - pixels) * np.log(1 - p)).sum(1).mean()
    actual = loss.reconstruction_loss(jnp.asarray(logits), jnp.asarray(pixels))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_schedule_is_constant_over_an_epoch():
    schedule = loss.warmup_then_linear(1.0, epochs=10, warmup_epochs=5, steps_per_epoch=3)
    expected = [0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    actual = [float(schedule(step)) for step in range(30)]
    np.testing.assert_allclose(actual, np.repeat(expected, 3), rtol=1e-6)
    assert float(schedule(30)) == 0
    assert float(schedule(1000)) == 0


def test_schedule_without_warmup():
    schedule = loss.warmup_then_linear(2.0, epochs=4, warmup_epochs=1, steps_per_epoch=1)
    np.testing.assert_allclose([float(schedule(i)) for i in range(4)], [2, 1.5, 1, 0.5])


@pytest.mark.parametrize('warmup', [0, 11])
def test_bad_warmup(warmup):
    with pytest.raises(ValueError, match=rf'warmup_epochs must be in \[1, .*10\], got {warmup}'):
        loss.warmup_then_linear(1.0, epochs=10, warmup_epochs=warmup, steps_per_epoch=1)


def test_evaluate_is_the_loss_over_all_examples(paper_task):
    params = paper_task.init(jax.random.key(0))
    metrics = paper_task.evaluate(params)
    train, test = data.load('synthetic', None)
    np.testing.assert_allclose(metrics['train_loss'], paper_task.loss(params, train), rtol=1e-5)
    np.testing.assert_allclose(metrics['test_loss'], paper_task.loss(params, test), rtol=1e-5)


def test_evaluate_in_slices_with_a_remainder(monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(2300, 16)).astype(np.uint8)
    monkeypatch.setattr(data, 'load', lambda source, data_dir: (images, images[:7]))
    task_config = config.get_config()
    task_config.update(source='synthetic', hidden=(4,))
    task = tasks.make(task_config, None)
    params = task.init(jax.random.key(0))
    np.testing.assert_allclose(
        task.evaluate(params)['train_loss'], task.loss(params, images), rtol=1e-5
    )


def test_digits():
    train, test = data.load('digits', None)
    assert (train.shape, test.shape) == ((1536, 64), (261, 64))
    assert train.max() == data.MAX_PIXEL['digits']


def write_idx(folder: pathlib.Path, train: np.ndarray, test: np.ndarray) -> None:
    for name, images in zip(data._IDX_FILES, (train, test), strict=True):
        header = np.array([2051, *images.shape], '>i4').tobytes()
        with gzip.open(folder / name, 'wb') as file:
            file.write(header + images.tobytes())


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 2, 3)).astype(np.uint8) for n in (5, 3))
    write_idx(tmp_path, train, test)
    loaded = data.load('mnist', str(tmp_path))
    for images, raw in zip(loaded, (train, test), strict=True):
        assert sorted(map(bytes, images)) == sorted(map(bytes, raw.reshape(len(raw), -1)))
        assert list(map(bytes, images)) == sorted(map(bytes, images))


def test_broken_idx_file_is_named(tmp_path):
    write_idx(tmp_path, np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 2), np.uint8))
    for content in (b'not gzip', gzip.compress(b'short'), gzip.compress(b'\0' * 100)):
        (tmp_path / data._IDX_FILES[0]).write_bytes(content)
        data.load.cache_clear()
        with pytest.raises(ValueError, match=r'train-images.* is not a gzipped IDX file'):
            data.load('mnist', str(tmp_path))


@pytest.mark.slow
def test_real_mnist_is_the_same_from_both_forms(data_dir, tmp_path):
    train, test = data.load('mnist', data_dir)
    assert (train.shape, test.shape) == ((60000, 784), (10000, 784))
    # Published means of the training and test pixels.
    assert round(train.mean() / 255, 4) == 0.1307
    assert round(test.mean() / 255, 4) == 0.1325
    assert importlib.util.find_spec('tensorflow_datasets')
    root = pathlib.Path(data_dir)
    for folder in ('mnist', 'tensorflow_datasets'):
        only = tmp_path / folder
        only.mkdir()
        (only / folder).symlink_to(root / folder)
        for images, expected in zip(data.load('mnist', str(only)), (train, test), strict=True):
            np.testing.assert_array_equal(images, expected)


def test_units_that_say_nothing():
    """A saturated unit is one; one that is saturated at both ends is none, nor is the code."""
    from flax import nnx

    from experiments.tasks.autoencoder import model

    network = model.Autoencoder((16, 6, 2, 4, 16), nnx.Rngs(0))
    images = jnp.asarray(data.load('synthetic', None)[0][:50] / 255.0, jnp.float32)
    assert network.constant_units(images) == 0
    first, code, third = network.dense_0, network.dense_1, network.dense_2
    first.bias[...] = first.bias[...].at[1].set(20.0).at[4].set(-20.0)
    assert network.constant_units(images) == pytest.approx(2 / 10)
    third.kernel[...] = third.kernel[...].at[:, 0].multiply(1e4)  # 1 or -1
    assert network.constant_units(images) == pytest.approx(2 / 10)
    code.kernel[...] = jnp.zeros_like(code.kernel[...])  # and the third layer's with it
    assert network.constant_units(images) == pytest.approx(6 / 10)


def test_summary_says_how_many_units_are_constant(paper_task):
    params = paper_task.init(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, params)
    assert paper_task.describe(zero) == {'constant_units': 1}
    loud = jax.tree.map(lambda x: 10 * x, params)
    assert paper_task.describe(loud)['constant_units'] < 0.01
