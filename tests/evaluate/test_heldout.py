import json

import pytest

from sa2jax.errors import DataError
from sa2jax.evaluate.heldout import HeldOut, evenly_spaced, read_samples


def test_a_corpus_and_its_held_out_folder_are_the_same_set(corpus):
    whole, alone = HeldOut.find(corpus), HeldOut.find(corpus / "heldout")
    assert whole == alone
    assert list(whole.voices) == ["anna", "bert"]
    sample = whole.samples("sums")[3]
    assert (sample.name, sample.expected, sample.tool, sample.text) == ("sums:4", "three", None, "")
    assert sample.audio == corpus / "heldout" / "3.wav"
    assert sample.reference == corpus / "heldout" / "said" / "3.wav"
    assert sample.system == "You are a helpful assistant."
    assert [s.tool for s in whole.samples("tools", 4)] == [None] * 4  # every second
    assert whole.samples("tools")[1].tool == "get_date_time"
    assert json.loads(whole.samples("tools")[0].tools)[0]["type"] == "function"
    assert whole.samples("tts")[0].text == "read 0"
    assert whole.samples("nothing") == []


def test_few_samples_are_spread_over_all():
    assert evenly_spaced(range(100), 4) == [0, 25, 50, 75]
    assert evenly_spaced(range(3), 10) == evenly_spaced(range(3), None) == [0, 1, 2]


def test_lines_of_recordings_and_texts(tmp_path, corpus):
    (corpus / "heldout" / "digits.jsonl").write_text('{"audio": "3.wav", "text": "three"}\n\n')
    (sample,) = HeldOut.find(corpus).samples("digits")
    assert (sample.expected, sample.audio.name) == ("three", "3.wav")


def test_every_form_that_training_reads(corpus):
    """With what is written beside a clip, and in its place."""
    home = corpus / "heldout"
    asked = [{"type": "text", "text": "Now: "}, {"type": "audio", "audio": "3.wav"}]
    call = {"function": {"name": "find", "arguments": {}}}
    rows = [
        {"query": "<audio>What is it?", "response": "tea", "audios": ["3.wav"], "system": "S"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "yes", "tool_calls": [call]},
            ]
        },
    ]
    (home / "forms.json").write_text(json.dumps(rows, indent=1))
    tea, hello, yes = read_samples(home / "forms.json")
    assert (tea.name, tea.system, tea.expected) == ("forms[0]", "S", "tea")
    assert tea.content == [home / "3.wav", "What is it?"]
    assert (hello.content, hello.audio, hello.expected) == ("hi", None, "hello")
    assert (yes.content, yes.tool) == (["Now: ", home / "3.wav"], "find")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"audio": "3.wav"}', '{"messages": []}', "null", '{"query": "a"}']
)
def test_a_line_that_is_none_is_named(corpus, line):
    path = corpus / "heldout" / "bad.jsonl"
    path.write_text('{"audio": "3.wav", "text": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: expected a question"):
        read_samples(path)


def test_what_is_wrong_with_a_line_is_said(corpus):
    path = corpus / "heldout" / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(DataError, match="messages are of user: expected a user and an assistant"):
        read_samples(path)
    path.write_text('{"audio": "3.wav"}')
    with pytest.raises(DataError, match=r"expected a list of messages .* got 'audio'"):
        read_samples(path)


def test_what_is_not_there_is_an_error(corpus, tmp_path):
    path = corpus / "heldout" / "bad.jsonl"
    path.write_text('{"audio": "none.wav", "text": "x"}\n')
    with pytest.raises(DataError, match="no such recording"):
        read_samples(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no held-out set"):
        HeldOut.find(tmp_path / "elsewhere")
