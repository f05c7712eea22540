"""`python -m llmpq.run` is `llmpq-run`: the name that torchrun and the command itself start."""
