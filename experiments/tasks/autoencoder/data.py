"""Images as rows of pixels: MNIST, scikit-learn's embedded digits, or synthetic ones."""

import functools
import gzip
import importlib.util
import pathlib

import numpy as np

MAX_PIXEL = {'mnist': 255, 'digits': 16, 'synthetic': 255}

_IDX_FILES = ('train-images-idx3-ubyte.gz', 't10k-images-idx3-ubyte.gz')


@functools.cache  # a sweep reads its data once
def load(source: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The images of a source.

    Args:
      source: 'mnist', 'digits' or 'synthetic'.
      data_dir: where MNIST lies: in TFDS form below ``tensorflow_datasets`` or in the folder
        itself (read by ``tfds.data_source``, without TensorFlow), or as the IDX files below
        ``mnist`` or in the folder itself. Both forms give the same arrays.

    Returns:
      Train and test images, uint8 of shape (examples, pixels), up to ``MAX_PIXEL[source]``.

    Raises:
      ValueError: if the source is unknown.
      FileNotFoundError: if MNIST is not there.
    """
    if source == 'mnist':
        return _mnist(data_dir)
    if source == 'digits':
        return _digits()
    if source == 'synthetic':
        return _synthetic()
    raise ValueError(f'task.source must be one of {sorted(MAX_PIXEL)}, got {source!r}.')


def _mnist(data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    wanted = f'tensorflow_datasets/mnist or mnist/{_IDX_FILES[0]}'
    if data_dir is None:
        raise FileNotFoundError(f"source 'mnist' needs --data_dir, a folder with {wanted}.")
    root = pathlib.Path(data_dir)
    idx = [f for f in (root / 'mnist', root) if (f / _IDX_FILES[0]).exists()]
    tfds_form = [f for f in (root / 'tensorflow_datasets', root) if _is_tfds(f / 'mnist')]
    if tfds_form and (importlib.util.find_spec('tensorflow_datasets') or not idx):
        train, test = (_read_tfds(tfds_form[0], split) for split in ('train', 'test'))
    elif idx:
        train, test = (_read_idx(idx[0] / name) for name in _IDX_FILES)
    else:
        raise FileNotFoundError(f"source 'mnist': --data_dir={data_dir!r} has no {wanted}.")
    return _in_canonical_order(train), _in_canonical_order(test)


def _in_canonical_order(images: np.ndarray) -> np.ndarray:
    """Sorted: the two forms list the same images in different orders, and a seed's run should
    not depend on the form. Training shuffles anyway.
    """
    return images[sorted(range(len(images)), key=lambda i: images[i].tobytes())]


def _is_tfds(folder: pathlib.Path) -> bool:
    return any(folder.glob('*/dataset_info.json'))


def _read_tfds(folder: pathlib.Path, split: str) -> np.ndarray:
    import tensorflow_datasets as tfds

    source = tfds.data_source('mnist', split=split, data_dir=str(folder), download=False)
    examples = source.__getitems__(list(range(len(source))))
    return np.stack([example['image'] for example in examples]).reshape(len(source), -1)


def _read_idx(path: pathlib.Path) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            header = np.frombuffer(file.read(16), '>i4')
            pixels = np.frombuffer(file.read(), np.uint8)
        if header[0] != 2051:
            raise ValueError(f'the magic number is {header[0]}, of IDX images 2051')
        return pixels.reshape(header[1], header[2] * header[3])
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f'{path} is not a gzipped IDX file of images: {error}.') from error


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    images = datasets.load_digits().images.reshape(-1, 64).astype(np.uint8)
    return images[:1536], images[1536:]


def _synthetic() -> tuple[np.ndarray, np.ndarray]:
    """Random images of 4x4 pixels: for tests of the drivers."""
    rng = np.random.default_rng(0)
    images = 255 * rng.beta(0.3, 0.5, size=(288, 16))
    return images[:256].astype(np.uint8), images[256:].astype(np.uint8)
