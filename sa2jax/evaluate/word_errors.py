"""Word errors of transcripts, counted by jiwer."""

from collections.abc import Sequence

from sa2jax.evaluate.normalizer import normalized


def word_errors(expected: Sequence[str], predicted: Sequence[str]) -> tuple[list[int], list[int]]:
    """Substituted, left out and added words of each text, and the words that were expected.

    Texts are compared as `normalized`. The word error rate is sum of the first by sum of the
    second; counts of each text are what a confidence interval is drawn from.
    """
    import jiwer

    errors, totals = [], []
    for want, got in zip(map(normalized, expected), map(normalized, predicted), strict=True):
        totals.append(len(want.split()))
        alignment = jiwer.process_words(want, got) if want else None
        errors.append(
            len(got.split())
            if alignment is None
            else alignment.substitutions + alignment.deletions + alignment.insertions
        )
    return errors, totals
