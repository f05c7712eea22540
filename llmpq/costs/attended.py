"""The tokens that attention of a decode step reads, where a layer has a window.

Times are measured and predicted by the past tokens of a request. A layer that attends to a window
of W tokens reads W - 1 past ones and its own, however long the text is.

Not covered: prefill, which computes what a window hides too.
"""

import numpy as np

from llmpq.costs.links import Tokens


def attended_past(phase: str, past: Tokens, window: int | None) -> Tokens:
    """The past tokens that count for the time of a phase of a layer with this window."""
    return past if phase != "decode" or window is None else np.minimum(past, window - 1)
