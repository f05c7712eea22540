"""Writes a plan for another engine: a mixed-precision checkpoint and launch files for stock vLLM.

`served` decides the precision of every matrix, `quantization` describes them as compressed-tensors
does, `packed_tensors` rounds and packs one matrix, `checkpoint_writer` streams the model,
`launch_scripts` and `batch` start vLLM, and `vllm` joins all of them.
"""
