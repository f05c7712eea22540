"""Measures this machine, independently of any plan.

`layers` measures times and memory of layers: `grid` and `cell_queue` say what to measure and when,
`stacks` makes the computations, `sampling`, `drift` and `cells` evaluate samples, and `resume`
keeps them in a file. Other modules measure the quality of each precision (`sensitivity`), links
between ranks (`link_meter`) and devices (`device_probe`).
"""
