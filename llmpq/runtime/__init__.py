"""Runs a plan: every process loads only its layers, and the pipeline generates.

The life of a batch of requests:

1. The first stage reads prompts, sorts them by length and cuts them into batches (batching.py).
2. It tells all stages the lengths of the batch: one fixed table, `broadcast` (transport.py).
3. Prefill micro-batches of p prompts flow down the stages; each stage writes its slice of the
   KV cache (worker.py).
4. The last stage computes logits for the last position alone and chooses tokens (sampler.py).
5. Token ids alone go back to the first stage.
6. Decode micro-batches of q requests circulate, all in flight at once, until each request has
   met its end (EOS or its number of new tokens).
7. A request's line is written as soon as it ends (prompts.py).
8. After the last batch an empty table ends all stages; times are gathered into the report.
"""
