"""Whether what is served is right, and what a precision costs in quality.

evaluate.py, pipeline_loss.py  perplexity through stages in this process, and through a pipeline
streaming.py   many variants of a model at once, one layer in memory at a time
moments.py     second moments of every linear's inputs
texts.py       common texts by name
harness.py, tasks.py  lm-eval's tasks, answered by stages
verify.py, judge.py   whether a model's stages give what transformers gives
"""
