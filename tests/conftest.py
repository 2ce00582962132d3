"""Eight CPU devices for all tests, and hypothesis without deadlines."""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # as experiments/__init__.py does, and why
# Compiling is most of the suite's time, and LLVM's optimizations much of that. Tests that train
# for long ask for the fixture `optimized`; whoever sets this to 0 has them everywhere.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import hypothesis
import jax
import numpy as np
import pytest

# One LLVM module for a program, and no MLIR for its fusions: half the compilation of small ones.
_FLAGS = '--xla_cpu_parallel_codegen_split_count=1'
if jax.__version_info__ < (0, 11):  # later ones have no such flag, and end at one they do not know
    _FLAGS += ' --xla_cpu_use_fusion_emitters=false'
if _FLAGS not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAGS}'

jax.config.update('jax_num_cpu_devices', 8)
# As many batched decompositions as this at once would wait for each other for ever, in jaxlib 0.10
# (`matrix_root.batches_can_deadlock`): it is the number of cores, and eight devices work at once.
os.environ.setdefault('PJRT_NPROC', '32')

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what would begin after a deadline, in seconds since the epoch, where there is one."""
    if time.time() > float(os.environ.get('PRECOND_OPTAX_TEST_DEADLINE', 'inf')):
        pytest.skip('no time left')


@pytest.fixture
def optimized() -> Iterator[None]:
    """What the test compiles is compiled as for users."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


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
