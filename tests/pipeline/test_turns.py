"""Turns, undoing and forking, a full context, conversations on disk: with a scripted decoder."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from helpers.scripted import (
    AUDIO_START,
    CLIP,
    CODE_0,
    EOT,
    OPEN,
    RATE,
    SEARCH,
    SYSTEM,
    call,
    groups,
    heard,
    interrupt,
    turn,
    voice_called,
)

from sa2jax import audio, testing
from sa2jax.audio import AudioSource
from sa2jax.chat import template
from sa2jax.chat.content import as_pieces
from sa2jax.chat.tools import ToolCall
from sa2jax.errors import AudioError, PromptError
from sa2jax.inference.sampling import SamplingParams
from sa2jax.pipeline import StepAudio2

# --- turns ---


def test_second_turn_holds_the_first(script, model):
    script.will_say(b"Hi!", [*b"Bye", CODE_0, AUDIO_START], b"")
    chat = model.chat()
    assert chat.say("hello").text == "Hi!"
    assert chat.say([CLIP, "what?"]).text == "Bye"
    start = SYSTEM + turn("human", "hello")
    second = turn("human", heard(13), "what?")
    assert script.prompts[0] == start + OPEN
    assert script.prompts[1] == start + turn("assistant", "Hi!") + second + OPEN
    chat.say("bye")
    assert script.prompts[2] == (
        start
        + turn("assistant", "Hi!")
        + second
        + turn("assistant", [*b"Bye", CODE_0, AUDIO_START])  # as generated, nothing lost
        + turn("human", "bye")
        + OPEN
    )
    assert script.requests[2].counts == (13,)  # the generated <audio_start> is no clip
    assert script.prompt_indices == [0, 1, 2]  # each answer draws anew


def test_official_sampling_of_a_conversation(script, model):
    script.will_say(b"Hi!")
    model.chat().say("hello")
    (options,) = script.options
    assert options.sampling == SamplingParams(
        temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05
    )
    assert options.stop_ids == (EOT,)
    assert options.max_new_tokens == 4096


def test_a_text_is_one_piece_with_the_head_of_its_turn(script, model, monkeypatch):
    """As in the official template; a list of items is cut between them."""
    seen = []
    real = template.build_prompt

    def spy(pieces, *rest, **more):
        seen.append([piece.marked for piece in pieces if isinstance(piece, template.Text)])
        return real(pieces, *rest, **more)

    monkeypatch.setattr(template, "build_prompt", spy)
    script.will_say(b"", b"")
    model.chat(system=None).say(" hello")
    model.chat(system=None).say([" hello", "you"])
    assert seen == [
        ["<|BOT|>human\n hello<|EOT|>", "<|BOT|>assistant\n"],
        ["<|BOT|>human\n", " hello", "you", "<|EOT|>", "<|BOT|>assistant\n"],
    ]


def test_a_recording_is_read_once(script, model, tmp_path):
    """What was said stays said, whatever becomes of the file."""
    audio.write_wav(tmp_path / "a.wav", CLIP[0], RATE)
    script.will_say(b"one", b"two")
    chat = model.chat(system=None)
    chat.say(tmp_path / "a.wav")
    (tmp_path / "a.wav").unlink()
    chat.say("again")
    np.testing.assert_array_equal(*(request.mels[0] for request in script.requests))


@pytest.mark.parametrize("nothing", ["", "  \n", [], [""], ["", " "]])
def test_nothing_said(script, model, nothing):
    chat = model.chat()
    with pytest.raises(PromptError, match="nothing was said: expected text, a recording, or both"):
        chat.say(nothing)
    assert chat.rounds == []


def test_a_bad_recording_changes_nothing(script, model):
    chat = model.chat()
    with pytest.raises(AudioError, match="does not exist"):
        chat.stream(["so", Path("nowhere.wav")])
    assert chat.rounds == script.prompts == []


def test_what_may_be_said(tmp_path):
    path = tmp_path / "x"
    assert as_pieces("hello") == [template.Text("hello")]
    for typed in ("question.wav", "look at /etc/x.MP3", str(path)):
        assert as_pieces(typed) == as_pieces([typed]) == [template.Text(typed)]
    named = AudioSource("b.wav", channel=1)
    pieces = as_pieces([path, named, b"bytes", CLIP, "text", {"type": "text", "text": "t"}])
    sources = [piece.source for piece in pieces if isinstance(piece, template.Audio)]
    assert sources == [path, named, b"bytes", CLIP]
    assert pieces[4:] == [template.Text("text"), template.Text("t")]
    with pytest.raises(PromptError, match="unsupported content item"):
        as_pieces(5)


def test_undo_and_fork(script, model):
    script.will_say(b"one", b"two", b"three", b"four")
    chat = model.chat(system=None)
    chat.say("a")
    other = chat.fork()
    chat.say("b")
    chat.undo()
    chat.say("c")
    other.say("d")
    first = turn("human", "a") + turn("assistant", "one")
    assert script.prompts[2] == first + turn("human", "c") + OPEN
    assert script.prompts[3] == first + turn("human", "d") + OPEN
    assert [len(c.history) for c in (chat, other)] == [4, 4]
    chat.undo()
    chat.undo()
    with pytest.raises(PromptError, match="there is nothing to undo"):
        chat.undo()


# --- a full context ---


def test_the_oldest_turns_are_dropped(script, model):
    """The context holds 1024 tokens, a quarter of it is kept for an answer."""
    script.will_say(b"one", b"two", b"three", b"four")
    chat = model.chat("S")
    for name in "abc":
        reply = chat.say(name * 300)
    assert reply.notes == ("the oldest turn was dropped: the model's context holds 1024 tokens",)
    head = turn("system", "S")
    assert script.prompts[2] == (
        head + turn("human", "b" * 300) + turn("assistant", "two") + turn("human", "c" * 300) + OPEN
    )
    assert len(chat.rounds) == 2
    assert chat.say("d" * 700).notes[0].startswith("the oldest 2 turns were dropped")
    assert len(chat.rounds) == 1


def test_a_full_context_may_be_refused(script, model):
    script.will_say(b"one", b"two", b"three")
    chat = model.chat("S", overflow="refuse")
    chat.say("a" * 300)
    chat.say("b" * 300)
    with pytest.raises(PromptError, match=r"undo turns, start anew, or .*overflow='drop'"):
        chat.say("c" * 300)
    assert len(chat.rounds) == 2
    assert chat.say("c").text == "three"


def test_dropped_turns_come_back_if_the_answer_fails(script, model, monkeypatch):
    script.will_say(b"one", b"two", b"three")
    chat = model.chat("S")
    chat.say("a" * 300)
    chat.say("b" * 300)
    monkeypatch.setattr("sa2jax.pipeline.answer.AnswerStep.run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.say("c" * 300)
    assert len(chat.rounds) == 2


def test_one_question_that_does_not_fit(model):
    chat = model.chat()
    with pytest.raises(PromptError, match="expected 1 to 1023, since the model's context of 1024"):
        chat.say("x" * 3000)
    assert len(chat.history) == 1  # as before: a shorter question may follow


# --- on disk ---


def test_save_and_load(script, model, tmp_path):
    script.will_say(groups("Hi", range(8)), b"two", b"three", b"four")
    chat = model.chat("S", voice="bert")
    chat.say([CLIP, "what?"])
    chat.say("again", speak=False)
    chat.save(tmp_path / "talk.json")
    other = model.chat().load(tmp_path / "talk.json")
    assert other.voice.name == "bert"
    chat.say("and", speak=False)
    other.say("and", speak=False)
    assert script.prompts[2] == script.prompts[3]
    np.testing.assert_array_equal(script.requests[2].mels[0], script.requests[3].mels[0])
    other.undo()
    other.undo()
    assert len(other.rounds) == 1


def test_a_conversation_of_another_checkpoint_is_refused(script, model, tmp_path):
    script.will_say(b"one", b"two")
    model.chat().say("a")
    chat = model.chat()
    chat.say("a")
    chat.save(tmp_path / "talk.json")
    strange = StepAudio2(model.cfg, testing.tiny_params(model.cfg, seed=1), model.tokenizer)
    theirs = strange.chat("T")
    with pytest.raises(PromptError, match="another checkpoint"):
        theirs.load(tmp_path / "talk.json")
    (tmp_path / "talk.json").write_text("{")
    mine = model.chat("T")
    with pytest.raises(PromptError):
        mine.load(tmp_path / "talk.json")
    assert [c.history for c in (theirs, mine)] == [(template.Message("system", "T"),)] * 2


def test_tools_come_back_with_a_conversation(script, model, tmp_path):
    """The schemas are those of the file; what runs them is what the new conversation has."""
    script.will_say(b"one", call("search", '{"query": "x"}'), b"two", call("get_date_time"), b"3")
    chat = model.chat(tools=[SEARCH, "get_date_time"])
    chat.say("a")
    chat.save(tmp_path / "talk.json")
    other = model.chat(tools=[SEARCH], functions={"search": lambda query: "found"})
    other.load(tmp_path / "talk.json")
    reply = other.say("b")
    assert (reply.text, reply.tool_results[0].text) == ("two", "found")
    plain = model.chat().load(tmp_path / "talk.json")
    assert plain.say("b").tool_results[0].ok  # a built-in tool needs no function
    assert not plain.tools.can_run(ToolCall("search", {}))


def test_a_conversation_without_questions(script, model, tmp_path):
    model.chat("T").save(tmp_path / "talk.json")
    chat = model.chat("S").load(tmp_path / "talk.json")
    assert chat.history == (template.Message("system", "T"),)


def test_tools_stay_where_the_file_has_none(script, model, tmp_path):
    script.will_say(call("get_date_time"), b"now")
    model.chat("T").save(tmp_path / "talk.json")
    chat = model.chat("S", tools=["get_date_time"]).load(tmp_path / "talk.json")
    assert [turn.role for turn in chat.history] == ["system", "tool_json_schemas"]
    assert chat.say("time?").text == "now"


def test_a_history_opens_no_file_as_its_voice(script, model, tmp_path, caplog, monkeypatch):
    """A voice is kept by name and hash; a file is never looked for, whatever the history says."""
    (tmp_path / "me.wav").write_bytes(b"")
    speech, asked = model.speech, []
    known = speech.voice

    def voice(wanted):
        asked.append(wanted)
        return voice_called("me") if "me" in str(wanted) else known(wanted)

    monkeypatch.setattr(speech, "voice", voice)
    monkeypatch.chdir(tmp_path)
    script.will_say(groups("Hi", range(8)))
    chat, path = model.chat(voice=tmp_path / "me.wav"), tmp_path / "talk.json"
    chat.say("a")
    chat.save(path)
    document = json.loads(path.read_text())
    assert document["facts"] == {"voice": "me", "voice_hash": voice_called("me").hash}
    asked.clear()
    for name in ("me", "me.wav", str(tmp_path / "me.wav"), "../me.wav", 3, ["me"], "x" * 5000):
        document["facts"]["voice"] = name
        path.write_text(json.dumps(document))
        with caplog.at_level(logging.WARNING):
            assert model.chat().load(path).voice is None
        assert "goes on without its voice: this model has no voice" in caplog.messages[-1]
        assert len(caplog.messages[-1]) < 300
    assert asked == []


def test_a_voice_that_has_changed_is_not_taken_for_the_old_one(script, model, tmp_path, caplog):
    script.will_say(groups("Hi", range(8)))
    chat, path = model.chat(voice="bert"), tmp_path / "talk.json"
    chat.say("a")
    chat.save(path)
    path.write_text(path.read_text().replace(voice_called("bert").hash, "0" * 64))
    with caplog.at_level(logging.WARNING):
        assert model.chat().load(path).voice is None
    assert "this model's voice bert is another one" in caplog.text


def test_ids_that_the_model_does_not_have_are_refused(script, model, tmp_path):
    script.will_say(b"one")
    chat, path = model.chat("S"), tmp_path / "talk.json"
    chat.say("a")
    chat.save(path)
    vocab = model.cfg.decoder.vocab
    document = json.loads(path.read_text())
    document["turns"][-1]["content"] = [{"type": "ids", "ids": [vocab - 1]}]
    path.write_text(json.dumps(document))
    model.chat().load(path)
    for strange in (vocab, 2**31, 2**60):
        document["turns"][-1]["content"] = [{"type": "ids", "ids": [1, strange]}]
        path.write_text(json.dumps(document))
        with pytest.raises(
            PromptError, match=f"holds the id {strange}: expected ids below {vocab}"
        ):
            chat.load(path)
    assert len(chat.rounds) == 1


def test_a_voice_that_is_gone_is_missed(script, model, tmp_path, caplog):
    script.will_say(groups("Hi", range(8)))
    chat = model.chat(voice=voice_called("gone"))
    chat.say("a")
    chat.save(tmp_path / "talk.json")
    with caplog.at_level(logging.WARNING):
        assert model.chat().load(tmp_path / "talk.json").voice is None
    assert "goes on without its voice: this model has no voice 'gone'" in caplog.text


def test_fingerprints(model, params):
    from sa2jax.models.step_audio import unstack_decoder
    from sa2jax.pipeline.base import fingerprint_of

    cfg = model.cfg
    same = fingerprint_of(cfg, params)
    assert model.fingerprint == fingerprint_of(cfg, unstack_decoder(params)) == same
    assert fingerprint_of(cfg, testing.tiny_params(cfg, seed=1)) != same
    assert fingerprint_of(testing.tiny_config(max_positions=2048), params) != same
