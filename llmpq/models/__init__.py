"""How a Hugging Face decoder is cut into stages, using transformers' own classes and forward code.

family.py       finds the embedding, layers, final norm and head of a model, by `llmpq.families`
stage_model.py  some consecutive layers of a model as a module that runs alone
sharding.py     how several devices share the layers of a stage
lanes.py        keys and values of requests in slots, as transformers' cache
attention.py    attention over slots and its masks, as transformers looks them up
count.py        what a model holds and has alive, counted on its own modules (stage_memory.py,
                live_tensors.py); count_families.py: the table of families that ships
"""
