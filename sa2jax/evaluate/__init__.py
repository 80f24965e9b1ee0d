"""How good a model is: evaluation suites, judges that listen to what it says, tables of scores.

suite = find_suite("nano")
scores = run_suite(suite, model, suite.find_data(folder, None))

Judges are other people's models (the extra `judges`); nothing in the library needs them to run.
"""
