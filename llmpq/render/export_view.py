"""What `llmpq-export` says: how large the checkpoint is, and what to run next."""

from rich.console import Console

from llmpq.cluster import MIB
from llmpq.exported import Exported


def print_exported(out: Console, exported: Exported, folder: str) -> None:
    """Prints the sizes, and the commands that start the engine."""
    against = 100 * (exported.layer_bytes / exported.planned_layer_bytes - 1)
    shards = f"{exported.num_shards} shard{'s' if exported.num_shards > 1 else ''}"
    out.print(
        f"{folder}: {exported.checkpoint_bytes / MIB:.1f} MiB in {shards}; its "
        f"layers have {exported.layer_bytes / MIB:.1f} MiB, {against:+.1f} % against the plan",
        soft_wrap=True,
        markup=False,
    )
    for line in exported.next_steps:
        out.print(line, soft_wrap=True, markup=False)
