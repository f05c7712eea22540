"""The planner: searches orders, partitions, precisions and micro-batches. Never imports torch."""
