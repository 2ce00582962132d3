"""The experiments that reproduce the papers' tables. Not part of the library."""
