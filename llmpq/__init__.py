"""llmpq: plan and run large language models over unequal GPUs with a precision for every layer.

The names below are those of `llmpq.library`, each imported when it is first asked for: planning
imports no torch, and `import llmpq` nothing at all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmpq.version import __version__

if TYPE_CHECKING:
    from llmpq.library import (
        Engine,
        export_vllm,
        load_cluster,
        load_model,
        load_workload,
        plan,
        simulate,
    )

__all__ = [
    "Engine",
    "__version__",
    "export_vllm",
    "load_cluster",
    "load_model",
    "load_workload",
    "plan",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """A name of the library."""
    if name not in __all__:
        raise AttributeError(f"module 'llmpq' has no attribute '{name}'")
    return getattr(import_module("llmpq.library"), name)
