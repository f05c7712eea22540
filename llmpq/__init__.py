"""llmpq: plan and run large language models over unequal GPUs with a precision for every layer."""

__version__ = "0.1.0"
