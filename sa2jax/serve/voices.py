"""The voices of a server: those of the model, and those that clients have added to a folder."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa2jax.atomic_io import disk_errors, require_inside
from sa2jax.errors import CheckpointError, VoiceError
from sa2jax.serve.errors import ApiError
from sa2jax.speech import Speech
from sa2jax.speech.voices import SUFFIX, Voice, check_name


@dataclass(frozen=True, kw_only=True)
class AddedVoice:
    """A voice that a client has added, as it lies on disk.

    Attributes:
        name: what it is called.
        created_at: seconds of Unix time.
        size: of its file, in bytes.
    """

    name: str
    created_at: int
    size: int

    @property
    def id(self) -> str:
        """What OpenAI's clients name it by; it stays the same over a restart."""
        return f"voice_{self.name}"


class VoiceRegistry:
    """Finds, adds and removes voices; for worker threads, since voices are read and analysed.

    What is added is kept as the voice file of `sa2jax voice add`; the recording is not kept.

    Args:
        speech: the detokenizer and the model's own voices; None for a model that cannot speak.
        folder: where added voices lie; it is made if it is not there. None: none can be added.
        aliases: other names of voices.
        most: how many can be added.

    Raises:
        CheckpointError: if the folder cannot be made.
        VoiceError: for an alias of no voice.
    """

    def __init__(
        self,
        speech: Speech | None,
        folder: str | Path | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        most: int = 1000,
    ):
        self._speech, self._most = speech, most
        self._folder = None if folder is None else Path(folder)
        self._aliases = dict(aliases or {})
        self._lock = threading.Lock()  # of additions and removals
        self._loaded: dict[
            str, tuple[tuple[int, int], Voice]
        ] = {}  # by name, with the file's state
        if self._folder is not None:
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
        for alias, name in self._aliases.items():
            if name not in self.names:
                raise VoiceError(f"alias {alias}: there is no voice {name!r:.80}")

    @property
    def can_speak(self) -> bool:
        """Whether the model has a detokenizer."""
        return self._speech is not None

    @property
    def own(self) -> list[str]:
        """Names of the model's own voices."""
        return [] if self._speech is None else list(self._speech.folder.voices)

    @property
    def added(self) -> list[AddedVoice]:
        """The voices that were added, by name; also by another server that shares the folder."""
        found = []
        for path in sorted(self._folder.glob(f"[!.]*{SUFFIX}")) if self._folder else []:
            try:
                check_name(path.stem)
                facts = path.stat()
            except (OSError, VoiceError):  # gone meanwhile, or no file of ours
                continue
            found.append(
                AddedVoice(name=path.stem, created_at=int(facts.st_mtime), size=facts.st_size)
            )
        return found

    @property
    def names(self) -> list[str]:
        """All names that `find` knows, aliases left out."""
        own = self.own
        return [*own, *(voice.name for voice in self.added if voice.name not in own)]

    def find(self, wanted: str = "default") -> Voice:
        """A voice by its name or id. No name is ever taken for a file.

        Raises:
            VoiceError: if there is none, or it was made by another checkpoint.
            ApiError: if the model cannot speak.
        """
        speech = self._require_speech()
        name = self._aliases.get(wanted, wanted).removeprefix("voice_")
        own = self.own
        if name == "default" or name in own:
            return speech.voice(name)
        voice = self._find_added(speech, name)
        if voice is None and wanted in own:  # a voice whose name begins like an id
            return speech.voice(wanted)
        if voice is None:
            some = ", ".join(self.names[:12]) or "none yet"
            raise VoiceError(f"no voice {wanted!r:.80}: expected one of {some}")
        return voice

    def add(self, name: str, recording: Any) -> AddedVoice:
        """Make a voice of a recording and keep it.

        Args:
            name: what to call it.
            recording: whatever `sa2jax.audio` reads.

        Raises:
            VoiceError: if the name is taken or none, or the recording holds no voice.
            AudioError: if the recording cannot be read.
            ApiError: if the server takes no voices, or no more.
            CheckpointError: if it cannot be written.
        """
        speech, folder = self._require_speech(), self._require_folder()
        check_name(name)
        if name == "default" or name in self._aliases or name.startswith("voice_"):
            raise VoiceError(f"the name {name} has a meaning of its own: choose another one")
        self._require_free(name)
        voice = Voice.from_wav(recording, speech.folder.analyzer, name)
        path = folder / f"{name}{SUFFIX}"
        with self._lock:
            self._require_free(name)
            if len(self.added) >= self._most:
                raise ApiError(f"the server keeps at most {self._most} voices: remove some")
            require_inside(path.parent, folder)
            voice.save(path)
        return next(found for found in self.added if found.name == name)

    def remove(self, wanted: str) -> str:
        """Forget an added voice, by its name or id.

        Returns:
            Its name.

        Raises:
            ApiError: 404 if there is no such voice, 400 for one of the model's own.
            CheckpointError: if its file cannot be removed.
        """
        folder, name = self._require_folder(), wanted.removeprefix("voice_")
        with self._lock:
            if name not in (voice.name for voice in self.added):
                if name in self.own:
                    raise ApiError(f"voice {name} is the model's own and stays", param="name")
                raise ApiError(
                    f"no voice {wanted!r:.80}", 404, param="name", code="voice_not_found"
                )
            path = folder / f"{name}{SUFFIX}"
            with disk_errors(path):
                path.unlink(missing_ok=True)
            self._loaded.pop(name, None)
        return name

    def _find_added(self, speech: Speech, name: str) -> Voice | None:
        """A voice of the folder, read anew if its file is another one than before."""
        try:
            check_name(name)
            if self._folder is None:
                return None
            path = self._folder / f"{name}{SUFFIX}"
            facts = os.stat(path)
        except (OSError, VoiceError):
            return None
        state = facts.st_mtime_ns, facts.st_size
        known = self._loaded.get(name)
        if known is not None and known[0] == state:
            return known[1]
        voice = Voice.load(path)
        if voice.analysis_hash != speech.folder.analysis_hash:
            raise VoiceError(f"voice {name} was made by another model: remove it and add it again")
        voice.require_fit(speech.folder.cfg.flow)
        self._loaded[name] = state, voice
        return voice

    def _require_free(self, name: str) -> None:
        if name in self.names:
            raise VoiceError(f"there is a voice {name} already: choose another name or remove it")

    def _require_speech(self) -> Speech:
        if self._speech is None:
            raise ApiError("this model has no detokenizer: it cannot speak", code="no_speech")
        return self._speech

    def _require_folder(self) -> Path:
        if self._folder is None:
            raise ApiError(
                "this server takes no voices: it was started without --voices DIR",
                code="voices_not_kept",
            )
        return self._folder


def speech_of(model: Any) -> Speech | None:
    """The detokenizer of a model, None if it has none."""
    try:
        return model.speech
    except CheckpointError:
        return None
