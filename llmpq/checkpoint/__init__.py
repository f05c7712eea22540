"""Reads a Hugging Face checkpoint and fills a stage with its weights, rounded as a plan says.

checkpoint_files.py  which files hold the weights, and what their headers say
checkpoint.py        single tensors, one at a time
float8.py, prequantized.py  weights that are already stored with fewer bits
moments_file.py, roundings.py  how each weight is rounded
loader.py            one tensor after the other into a stage
packed_cache.py      packed weights, kept for the next start
kernels.py           kernels that a loaded stage needs
inventory.py, fingerprint.py  whether everything is served, and whether it is still the same
"""
