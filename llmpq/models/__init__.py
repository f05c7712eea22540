"""How a Hugging Face decoder is cut into stages, using transformers' own classes and forward code.

family.py       where each family keeps its embedding, layers, final norm and head
stage_model.py  some consecutive layers of a model as a module that runs alone
sharding.py     how several devices share the layers of a stage
kv_cache.py     keys and values of a whole batch, preallocated, and slices of it
"""
