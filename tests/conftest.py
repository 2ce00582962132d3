"""Eight CPU devices for all tests, and hypothesis without deadlines."""

import os

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update('jax_num_cpu_devices', 8)

hypothesis.settings.register_profile(
    'tests', deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile('tests')


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def data_dir() -> str:
    """The folder of the real data sets; the test is skipped where it is not named."""
    folder = os.environ.get('PRECOND_OPTAX_DATA')
    if not folder:
        pytest.skip('PRECOND_OPTAX_DATA is not set')
    return folder
