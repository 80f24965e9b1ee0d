"""Conversations at the command line: answers as they come, and the interactive session."""

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sa2jax.cli import common, wav_output
from sa2jax.cli.options import SoundOptions, VoiceOptions
from sa2jax.errors import PromptError, Sa2jaxError

if TYPE_CHECKING:
    from sa2jax.chat.tools import MalformedToolCall, ToolCall
    from sa2jax.pipeline.conversation import Chat
    from sa2jax.pipeline.reply import Reply, Timings
    from sa2jax.pipeline.stream import Stream

HELP = """\
a line is a question
/audio FILE ...  ask by recordings: /audio question.wav "another one.wav"
/voice NAME      answer in this voice; /voice off to write, /voice to list voices
/save FILE.json  write the conversation
/load FILE.json  go on with one that was saved
/undo            take back the last question and its answer
/quit            end; so do Ctrl-D and Ctrl-C; while an answer comes, Ctrl-C interrupts it"""


@dataclass
class LiveChat:
    """A conversation and how its answers are delivered.

    Attributes:
        chat: the conversation.
        text: where text goes as it comes; None to print nothing.
        first: codes of the first chunk of sound.
        limit: of each answer's tokens; by default 4096 if it is spoken and 1024 if not.
        history: where `save` saves the conversation.
        interactive: whether Ctrl-C ends an answer instead of the command.
    """

    chat: "Chat"
    text: TextIO | None
    first: int | None = None
    limit: int | None = None
    history: Path | None = None
    interactive: bool = False

    def ask(self, content: Any, out: Path | None) -> "Reply":
        """Say something and give out the answer as it comes.

        Args:
            content: see `Chat.stream`.
            out: where its sound goes, see `wav_output.sink`; None for a written answer.
        """
        chat, usual = self.chat, 1024 if out is None else 4096
        limit = usual if self.limit is None else self.limit
        chat.options = replace(chat.options, max_new_tokens=limit)
        stream = chat.stream(content, speak=out is not None, first=self.first)
        with wav_output.sink(out, chat.model) as write:
            try:
                self._print_stream(stream, write)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                stream.cancel()
                common.log("interrupted")
            except Sa2jaxError:
                stream.abandon()
                raise
        return stream.reply

    def _print_stream(self, stream: "Stream", write: wav_output.Write) -> None:
        has_text = thinking = False
        try:
            for piece in stream:
                if len(piece.audio):
                    write(piece.audio)
                if self.text is None:
                    continue
                if thinking and not piece.thinking:
                    common.log("")
                text = piece.text if has_text else piece.text.lstrip()  # speech begins with a space
                thinking, has_text = bool(piece.thinking), has_text or bool(text)
                print(piece.thinking, end="", file=sys.stderr, flush=True)
                print(text, end="", file=self.text, flush=True)
                for result in piece.tool_results:
                    common.log(f"[{getattr(result.call, 'name', 'call')}] {result.text}")
        finally:
            if has_text:
                print(file=self.text, flush=True)

    def save(self) -> None:
        """Save the conversation, if it is to be."""
        if self.history is not None:
            self.chat.save(self.history)

    def resume(self, path: Path) -> str:
        """Go on with a conversation that was saved; gives a line that says so."""
        self.chat.load(path)
        voice = "" if self.chat.voice is None else f", in the voice {self.chat.voice.name}"
        return f"{path}: {len(self.chat.rounds)} questions so far{voice}"


def print_summary(reply: "Reply", out: Path | None, *, times: bool = True) -> None:
    """Print an answer's notes and times to stderr."""
    for note in reply.notes:
        common.log(note)
    if times and reply.timings is not None:
        name = f"{out}: " if out not in (None, wav_output.PIPE) and len(reply.audio) else ""
        common.log(f"{name}{timings_text(reply.timings)}")
    if out is not None and not len(reply.audio):
        common.log("this answer has no sound")


def timings_text(timings: "Timings") -> str:
    """One line of figures."""
    first, kind = timings.first_audio, "sound"
    if first is None:
        first, kind = timings.first_text, "text"
    parts = [] if first is None else [f"first {kind} {first:.2f} s"]
    if timings.real_time_factor is None:
        parts.append(f"{timings.total:.2f} s in all")
    else:
        speed = f"({timings.real_time_factor:.2f} x real time)"
        parts.append(f"{timings.speech:.2f} s of speech in {timings.total:.2f} s {speed}")
    return ", ".join(
        [*parts, f"{timings.prompt_tokens} prompt tokens", f"{timings.generated_tokens} generated"]
    )


def unanswered(reply: "Reply") -> Sequence["ToolCall | MalformedToolCall"]:
    """The calls of tools that nobody ran."""
    return reply.tool_calls[len(reply.tool_results) :]


def call_text(call: "ToolCall | MalformedToolCall") -> str:
    """A call as the model writes it."""
    from sa2jax.chat.tools import ToolCall

    return call.to_text() if isinstance(call, ToolCall) else call.text


class Repl:
    """An interactive session: reads lines from stdin until there are no more.

    Args:
        live: the conversation.
        out: where spoken answers go: `PIPE`, or the wav file to whose name they are counted.
        sound: what is heard of recordings.
        voices: what is heard of recordings of voices.
    """

    def __init__(self, live: LiveChat, out: Path, sound: SoundOptions, voices: VoiceOptions):
        self._live, self._chat, self._out = live, live.chat, out
        self._sound, self._voices = sound, voices

    def run(self) -> None:
        """Hold the conversation; a mistake costs a line, not the conversation."""
        if sys.stdin.isatty():
            common.log("Ask something, or /audio FILE; /help for more.")
        while True:
            try:
                line = _line("> " if sys.stdin.isatty() else "")
                if line is None or line == "/quit":
                    return
                self._take(line)
            except Sa2jaxError as error:
                common.log_error(error)
            except KeyboardInterrupt:
                common.log("interrupted")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            self._command(name, rest.strip())
        elif line:
            from sa2jax.chat.template import Text

            if os.path.isfile(line):
                common.log(f"taken as text; to be heard: /audio {shlex.quote(line)}")
            self._say([Text(line)])

    def _say(self, content: Any) -> None:
        """Say something; as long as the answer is a call of tools nobody runs, ask for results."""
        from sa2jax.chat.toolbox import ToolAnswer

        while content is not None:
            out = None if self._chat.voice is None else self._next_path()
            reply = self._live.ask(content, out)
            print_summary(reply, out)
            self._live.save()
            content = None
            if reply.finish_reason == "tool_calls":
                text = self._results(unanswered(reply))
                content = None if text is None else ToolAnswer(text)
            else:
                for call in unanswered(reply):
                    print(call_text(call), file=self._live.text, flush=True)

    def _results(self, calls: Sequence["ToolCall | MalformedToolCall"]) -> str | None:
        """What the tools answer: of those nobody runs, what is typed; None if nothing is."""
        from sa2jax.chat.toolbox import ToolResult, results_text
        from sa2jax.chat.tools import ToolCall

        results: list[ToolResult] = []
        for call in calls:
            if self._chat.tools.can_run(call) or not isinstance(call, ToolCall):
                results += self._chat.tools.run([call])
                continue
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            text = _line(f"result of {call.name} {arguments}: ")
            if text is None:
                return None
            results.append(ToolResult(call, text, True))
        return results_text(results)

    def _command(self, name: str, rest: str) -> None:
        chat, path = self._chat, Path(os.path.expanduser(rest))
        if name in ("save", "load") and not rest:
            raise PromptError(f"which file? /{name} FILE.json")
        match name:
            case "audio":
                self._say(self._sound.sources(_recordings(rest)))
            case "voice":
                self._voice(rest)
            case "save":
                chat.save(path)
                common.log(f"saved as {path}")
            case "load":
                common.log(self._live.resume(path))
                self._live.save()
            case "undo":
                chat.undo()
                common.log("the last question and its answer are taken back")
                self._live.save()
            case "help":
                common.log(HELP)
            case _:
                raise PromptError(f"there is no /{name}: /help lists what there is")

    def _voice(self, name: str) -> None:
        if not name:
            known = ", ".join(self._chat.model.speech.folder.voices) or "none yet"
            common.log(f"/voice NAME: off, a recording, or one of: {known}")
            return
        off = name == "off"
        self._chat.voice = None if off else self._voices.speaker(os.path.expanduser(name))
        common.log(f"voice: {'off' if self._chat.voice is None else self._chat.voice.name}")

    def _next_path(self) -> Path:
        """The file of the next spoken answer: none of those that exist."""
        if self._out == wav_output.PIPE:
            return self._out
        stem, suffix = self._out.stem, self._out.suffix
        pattern = re.compile(rf"{re.escape(stem)}-([0-9]+){re.escape(suffix)}")
        matches = [pattern.fullmatch(path.name) for path in self._out.absolute().parent.iterdir()]
        number = max((int(name[1]) for name in matches if name), default=0) + 1
        return self._out.with_name(f"{stem}-{number}{suffix}")


def _line(prompt: str) -> str | None:
    """The next line from stdin; None at its end or for Ctrl-C."""
    if prompt:
        print(prompt, end="" if sys.stdin.isatty() else "\n", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    except UnicodeDecodeError as error:
        raise PromptError(f"expected a line of text in UTF-8 ({error.reason})") from None
    if not line and sys.stdin.isatty():
        common.log("")
    return line.strip() if line else None


def _recordings(line: str) -> list[Path]:
    """The recordings that a line names.

    Raises:
        PromptError: if it names none.
        AudioError: if there is no such file.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation mark that nothing closes
        words = [line]
    if os.path.isfile(os.path.expanduser(line)):
        words = [line]  # a name with spaces
    if not words:
        raise PromptError("which recording? /audio FILE.wav")
    paths = [Path(os.path.expanduser(word)) for word in words]
    for path in paths:
        common.require_file(path)
    return paths
