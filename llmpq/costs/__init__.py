"""Costs: how long, how much memory, how much quality. Pure functions over values; numpy only."""
