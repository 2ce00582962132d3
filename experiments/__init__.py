"""The experiments that reproduce the papers' tables. Not part of the library."""

import os

# Before anything loads OpenBLAS: its threads beside jaxlib's slow small eigenproblems down where
# others need the cores too, and overrun its buffers on a machine with hundreds (jax issue 39292).
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
