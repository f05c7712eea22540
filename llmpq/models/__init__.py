"""Cuts a Hugging Face decoder into stages, using transformers' own classes and forward code.

family.py       finds the embedding, layers, final norm and head of a model, by `llmpq.families`
stage_model.py  makes consecutive layers of a model a module that runs alone
passing.py      empties the layers of other stages
adapt.py        changes modules that a stage cannot run as they are (latent.py: latent attention)
buffers.py, rope.py  compute constants, and positions that depend on the length of a text
experts.py      replaces transformers' experts by linears of their own (linears.py makes them)
raw_tensors.py  names the tensors that a stage needs of a checkpoint
sharding.py     cuts the layers of a stage for several devices
lanes.py        holds keys and values of requests in slots, as transformers' cache
attention.py    computes attention over slots and its masks (triton_attention.py on cards)
count.py        counts parameters and allocations on a model's own modules (stage_memory.py,
                live_tensors.py); count_families.py makes the table of families that ships
"""
