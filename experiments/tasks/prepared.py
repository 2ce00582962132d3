"""Data sets that TFDS has prepared, as array_record: read without TensorFlow."""

import pathlib
from typing import Any


def data_source(name: str, split: str, data_dir: str | None) -> Any:
    """A split of a prepared data set, by TFDS's name; nothing is downloaded.

    Args:
      name: of the builder, with its config: 'c4/en'.
      split: one of its splits, or a part of one: 'train[:1%]'.
      data_dir: TFDS's own folder, or one that has it as ``tensorflow_datasets``. None: where
        TFDS looks.

    Raises:
      FileNotFoundError: if it is not there.
    """
    import tensorflow_datasets as tfds

    root = None if data_dir is None else pathlib.Path(data_dir)
    if root is not None and (root / 'tensorflow_datasets').is_dir():
        root /= 'tensorflow_datasets'
    try:
        return tfds.data_source(
            name, split=split, data_dir=None if root is None else str(root), download=False
        )
    except (AssertionError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f'{name} is not prepared in {root or "the folder of TFDS"}: {error}'
        ) from error
