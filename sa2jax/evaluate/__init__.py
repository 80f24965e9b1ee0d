"""Evaluation: suites, judges that listen to replies, tables of scores.

suite = find_suite("nano")
scores = run_suite(suite, model, suite.find_data(folder, None))

Judges are other people's models (the extra `judges`); nothing in the library needs them to run.
"""
