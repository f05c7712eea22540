"""`python -m llmpq.run`, which is what torchrun starts; the same command as `llmpq-run`."""

from llmpq.cli.run import main

if __name__ == "__main__":
    main()
