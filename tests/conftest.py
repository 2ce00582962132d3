"""Eight CPU devices for all tests, and hypothesis without deadlines."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # as experiments/__init__.py does, and why
# Compiling is most of the suite's time, and LLVM's optimizations much of that. The slow tests, and
# whoever sets this to 0, have them.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update('jax_num_cpu_devices', 8)

# Many checks compile the same program: once for all, over all workers of one session.
_CACHE = 'PRECOND_OPTAX_TEST_CACHE'
if _CACHE not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix='precond_optax_test_')
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', os.environ[_CACHE])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)

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
