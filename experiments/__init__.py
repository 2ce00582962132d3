"""The experiments that reproduce the papers' tables. Not part of the library."""

import os

# Before anything loads OpenBLAS: its threads beside jaxlib's slow small eigenproblems down, by a
# factor of ten on a busy machine, and overrun its buffers on one with many cores.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
