"""`python -m sa2jax.cli`."""

from sa2jax.cli import main

main()
