"""Runs a plan: every process loads only its layers, and the pipeline generates.

The life of a request:

1. The first stage checks the prompts file and reads it again, line by line (llmpq.prompts).
2. The schedule gives the request a slot in the KV cache and decides every job (llmpq.schedule,
   leader.py).
3. A job goes down the stages as a header (jobs.py) and hidden states (transport.py), received
   ahead in a thread (inbox.py). Its prompt is computed, alone or with others; each stage stores
   its part of the cache (worker.py, llmpq.models.lanes).
4. The last stage computes logits for the last position only and chooses tokens (sampler.py).
5. Only token ids return to the first stage (the token return path, messages.py).
6. Decode steps follow, all lanes in flight at once, until the request has met its end (EOS or its
   number of new tokens). Its slot is given to the next request.
7. Its line is written as soon as it ends, to a journal first (llmpq.reliability).
8. After the last request all stages end; times are gathered into the report (engine.py).

Workers watch each other meanwhile; llmpq.reliability does that, and ends processes early.
Weights come from llmpq.checkpoint.
"""
