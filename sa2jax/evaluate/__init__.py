"""How good a model is: judges that listen to what it says, and tables of scores.

from sa2jax.evaluate.nano import evaluate_nano
scores = evaluate_nano(model, "corpus")

Judges are other people's models (the extra `judges`); nothing in the library needs them to run.
"""
