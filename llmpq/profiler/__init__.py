"""Measures on this machine; knows nothing of plans.

Times and memory of layers: `layers` (the loop), `grid` and `schedule` (what, and when), `stacks`
(the computations), `sampling`, `drift` and `cells` (what samples say), `resume`. Apart from these:
what each precision does to quality (`sensitivity`), `links`, `devices`.
"""
