"""A detokenizer and its voices on disk, opened; see `layout` for the files."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sa2jax import checkpoint
from sa2jax.assets import model_folder
from sa2jax.atomic_io import require_inside
from sa2jax.audio import AudioSource
from sa2jax.errors import AudioError, CheckpointError, VoiceError
from sa2jax.nn import Params
from sa2jax.speech.layout import (
    ANALYSIS,
    DEFAULT_VOICE,
    DEFAULTS,
    RECORDINGS,
    VOICES,
    find,
    is_official,
)
from sa2jax.speech.voices import MAX_SECONDS, SUFFIX, Voice, VoiceAnalyzer, check_name
from sa2jax.speech_config import Token2WavConfig


class SpeechFolder:
    """A detokenizer on disk; nothing is read before it is needed.

    Args:
        home: a model folder with a detokenizer in it, or a detokenizer's own folder; converted or
            as released.
        parity: analyse recordings as the official code does, see `VoiceAnalyzer`.

    Raises:
        CheckpointError: if there is no detokenizer.
    """

    def __init__(self, home: str | Path, *, parity: bool = False):
        self.home, self.parity = model_folder(home), parity
        if not self.home.is_dir():
            raise CheckpointError(f"no folder {home}: expected a model folder")
        found = find(self.home)
        if found is not None:
            self.folder, self.official = found, is_official(found)
            return
        raise CheckpointError(
            f"{home} has no detokenizer, it cannot speak: expected a folder token2wav/ with "
            "flow.yaml, flow.pt, hift.pt and two .onnx files before the conversion"
        )

    @cached_property
    def cfg(self) -> Token2WavConfig:
        """Sizes."""
        if self.official:
            return self._official[0]
        return Token2WavConfig.from_dict(self._info["config"])

    @cached_property
    def analysis_hash(self) -> str:
        """Hash of the weights that analyse voices."""
        if self.official:
            return checkpoint.content_hash({name: self._official[1][name] for name in ANALYSIS})
        return self._info["analysis"]

    def params(self, names: Sequence[str]) -> Params:
        """Parameters of some of the four networks in float32, on the first device."""
        if self.official:
            return {name: self._official[1][name] for name in names}
        return {
            name: checkpoint.load_params(self.folder, dtype="float32", branch=name)
            for name in names
        }

    @cached_property
    def analyzer(self) -> VoiceAnalyzer:
        """The networks that analyse voices."""
        params = self.params(ANALYSIS)
        return VoiceAnalyzer(self.cfg, params, self.analysis_hash, parity=self.parity)

    @property
    def voices(self) -> dict[str, Path]:
        """File of each known voice, by name: voices, and recordings that can become some."""
        found: dict[str, Path] = {}
        for folder, suffix in ((self.home / RECORDINGS, ".wav"), (self.home / VOICES, SUFFIX)):
            for path in sorted(folder.glob(f"[!.]*{suffix}")):
                found[path.stem] = path
        return found

    def voice(self, wanted: str | Path | AudioSource = "default") -> Voice:
        """A voice by its name, its file, or a recording of it.

        Args:
            wanted: a name from `voices`, a voice file, or a recording (analysed anew), also as an
                `AudioSource`; `default` is the checkpoint's default voice, or its only one.

        Raises:
            VoiceError: if there is none, or it was analysed by other weights.
            AudioError: if a recording cannot be read.
        """
        if isinstance(wanted, AudioSource):
            return Voice.from_wav(wanted, self.analyzer)
        path, known = Path(wanted), self.voices
        name = str(wanted)
        if name == "default" and (default := self._default(known)):
            name = default
        if name in known:
            path = known[name]
        elif path.suffix and path.is_file():
            name = path.stem
        else:
            some = ", ".join(list(known)[:12]) or "none yet"
            raise VoiceError(
                f"no voice {str(wanted)!r:.120}: expected a recording, a voice file, or one of "
                f"this model's voices ({some}); make one with `sa2jax voice add`"
            )
        if path.suffix != SUFFIX:
            return Voice.from_wav(path, self.analyzer)
        voice = Voice.load(path)
        if voice.analysis_hash != self.analysis_hash:
            raise VoiceError(
                f"voice {name} was analysed by another checkpoint's weights, its codes mean "
                f"something else here: add it again from its recording"
            )
        voice.require_fit(self.cfg.flow)
        return voice

    def add(self, name: str, source: str | Path | AudioSource, *, overwrite: bool = False) -> Voice:
        """Analyse a recording and keep the voice under a name.

        Raises:
            VoiceError: if the name is taken or cannot be a file's, or the recording holds no voice.
            AudioError: if the recording cannot be read.
            CheckpointError: if the voice cannot be written, or voices/ is a link out of the model.
        """
        check_name(name)
        path = self.home / VOICES / f"{name}{SUFFIX}"
        if path.exists() and not overwrite:
            raise VoiceError(f"there is a voice {name} already: choose another name or --overwrite")
        require_inside(path.parent, self.home)
        voice = Voice.from_wav(source, self.analyzer, name)
        if voice.seconds > MAX_SECONDS:  # with `parity`
            raise VoiceError(
                f"voice {name}: expected at most {MAX_SECONDS:g} s in a voice file, got "
                f"{voice.seconds:.1f} s; cut the recording"
            )
        voice.save(path)
        return voice

    def add_recordings(self) -> list[str]:
        """Make a voice of each recording in assets/ that has none yet.

        Returns:
            A note for each recording that holds no voice, or whose name no voice can have.
        """
        notes = []
        for name, path in self.voices.items():
            if path.suffix == SUFFIX:
                continue
            try:
                self.add(name, path)
            except (AudioError, VoiceError) as error:
                notes.append(f"{RECORDINGS}/{path.name} did not become a voice: {error}")
        return notes

    def _default(self, known: dict[str, Path]) -> str | None:
        own = [] if self.official else [self._info.get(DEFAULT_VOICE)]
        chosen = next((name for name in (*own, *DEFAULTS) if name in known), None)
        return chosen or (next(iter(known)) if len(known) == 1 else None)

    @cached_property
    def _info(self) -> dict:
        return checkpoint.read_info(self.folder)

    @cached_property
    def _official(self) -> tuple[Token2WavConfig, Params]:
        from sa2jax.convert.official import load_official

        return load_official(self.folder)
