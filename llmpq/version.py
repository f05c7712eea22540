"""The version of llmpq; results and kept files name it."""

__version__ = "0.1.0"
