"""What the command line of `llmpq-run` can ask for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TOO_LONG = ("error", "truncate", "fail")
FORMATS = ("auto", "llmpq", "openai")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunOptions:
    """What the command line asked for."""

    plan: Path
    prompts: Path
    output: Path
    report: Path | None
    trace: Path | None
    json_path: Path | None
    model: str | None
    moments: Path | None
    cache_dir: Path | None
    check_quality: bool
    check_text: Path | None
    check_windows: int | None
    resume: bool
    keep_errors: bool
    output_format: Literal["auto", "llmpq", "openai"]
    too_long: Literal["error", "truncate", "fail"]
    fsync: Literal["always", "interval", "never"]
    chat: bool
    refill: bool
    prefill_chunk: int | None
    graphs: bool
    batch_invariant: bool
    dry_run: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    device: str
    dtype: str
    quiet: bool
    verbose: bool

    @property
    def streams(self) -> bool:
        """Results go to standard output."""
        return str(self.output) == "-"
