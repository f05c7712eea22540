"""Least squares, with and without a sign: `columns` [rows, features] times coefficients ~ `wanted`.

Columns are scaled first, so that features of very different sizes do not lose digits. Not covered:
weights (callers multiply both sides by them).
"""

import numpy as np

RIDGE = 1e-9


def least_squares(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Coefficients of the least sum of squares; columns may be of any size."""
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    return np.linalg.lstsq(columns / scale, wanted, rcond=1e-10)[0] / scale


def non_negative(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0: Lawson and Hanson, "Solving Least Squares Problems"
    (1974), chapter 23. Here because importing scipy would take longer than planning."""
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    matrix = columns / scale
    gram, target = matrix.T @ matrix, matrix.T @ wanted
    solution = np.zeros(len(target))
    passive = np.zeros(len(target), dtype=bool)
    for _ in range(3 * len(target)):
        gradient = np.where(passive, -np.inf, target - gram @ solution)
        if gradient.max() <= 1e-9 * len(wanted):
            break
        passive[int(gradient.argmax())] = True
        solution = _within(gram, target, solution, passive)
        passive = solution > 0
    return solution / scale


def _within(
    gram: np.ndarray, target: np.ndarray, solution: np.ndarray, passive: np.ndarray
) -> np.ndarray:
    """Solves for the passive coefficients, dropping those that would turn negative on the way."""
    passive = passive.copy()
    while passive.any():
        free = np.zeros(len(target))
        part = gram[passive][:, passive]
        part.flat[:: len(part) + 1] *= 1 + RIDGE  # features may be copies of each other
        free[passive] = np.linalg.solve(part, target[passive])
        negative = passive & (free <= 0)
        if not negative.any():
            return free
        falls = solution[negative] - free[negative]
        step = (solution[negative] / np.maximum(falls, 1e-300)).min()
        solution = solution + step * (free - solution)
        passive &= solution > 1e-15
        solution = np.where(passive, solution, 0.0)
    return np.zeros(len(target))
