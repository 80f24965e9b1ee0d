"""Text normalizer: lower case, no punctuation, numbers spelled out."""

import re
import unicodedata

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ONES = (
    *DIGITS,
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
    *("seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SUMS = ONES[:19]  # what 0 to 9 and 0 to 9 can add up to
# An open vocabulary has to choose between words that sound alike; a reply of one number has not.
_SOUNDS_LIKE = {
    "won": "one",
    "to": "two",
    "too": "two",
    "for": "four",
    "fore": "four",
    "ate": "eight",
}


def number_words(value: int) -> str:
    """A number from 0 to 999 in words, as it is said: 342 is "three hundred forty two"."""
    hundreds, rest = divmod(value, 100)
    words = [ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        words.append(TENS[rest // 10 - 2])
        rest = rest % 10 or -1
    if rest > 0 or (rest == 0 and not words):
        words.append(ONES[rest])
    return " ".join(words)


def normalized(text: str) -> str:
    """A text as it is compared.

    Words in lower case, accents and punctuation left out ("o'clock" is "o clock"), hyphens as
    spaces, numbers of up to three digits in words. Longer numbers are spelled digit by digit, which
    is how a list of digits is said.
    """
    plain = unicodedata.normalize("NFKD", text).lower()
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"\bo['’]\s?clock", "o clock", plain)
    plain = re.sub(r"(?<=\w)['’](?=\w)", "", plain)
    words: list[str] = []
    for word in re.findall(r"[0-9]+|[^\W\d_]+", plain):
        if not word.isascii() or not word.isdigit():
            words.append(word)
        elif len(word) > 3 or (len(word) > 1 and word[0] == "0"):
            words += [ONES[int(digit)] for digit in word]
        else:
            words += number_words(int(word)).split()
    return " ".join(words)


def one_number(text: str) -> str:
    """A normalised text; where it is a single word that sounds like a number, that number."""
    plain = normalized(text)
    return _SOUNDS_LIKE.get(plain, plain)
