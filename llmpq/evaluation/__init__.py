"""Measures the quality of served models, and checks that stages compute what transformers does.

perplexity.py, pipeline_loss.py  perplexity through stages in this process, and through a pipeline
streaming.py     many variants of a model at once, with one layer in memory at a time
calibration.py   calibration statistics: second moments of the inputs of every linear layer
texts.py         common texts by name
scorer.py        log-likelihoods and continuations of token ids
harness.py, lm_eval_model.py, tasks.py  lm-eval's tasks, answered by stages
verify.py, judge.py  whether a model's stages give the logits of transformers
"""
