"""Reads a Hugging Face checkpoint and fills a stage with its weights, rounded as a plan says.

checkpoint_files.py  finds the files with the weights, and reads their headers
checkpoint.py        reads single tensors, one at a time
stored_names.py      finds tensors by the names and in the stacks of other layouts
float8.py, mxfp4.py, prequantized.py  read weights that are already stored with fewer bits
calibration_file.py, roundings.py  choose the rounding of each weight
loader.py            loads one tensor after the other into a stage
packed_cache.py      keeps packed weights for the next start
kernel_setup.py      compiles the kernels that a loaded stage needs
inventory.py, fingerprint.py  check that every tensor is served, and that files are unchanged
"""
