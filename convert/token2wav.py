"""Convert and export a detokenizer folder: four networks and the files beside them.

    as released                     converted
    flow.yaml  flow.pt              sa2jax.json     sizes, hash of the analysis, what export needs
    hift.pt                         params/         one Orbax checkpoint of all four networks
    campplus.onnx                   flow.yaml       as it came, like other small files
    speech_tokenizer_v2_25hz.onnx   *.graph         the .onnx files without their numbers

It is the folder token2wav/ of a model, or stands alone. Each number keeps its dtype, whatever dtype
the language model is converted to: audio codes and the phase of a waveform need float32.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import atomic_io, checkpoint
from sa2jax.checkpoint import Progress
from sa2jax.convert import torch_file, transfer
from sa2jax.convert.official import FILES, NETWORKS, OfficialDetokenizer
from sa2jax.convert.transfer import Report, StoredTensors, part_progress
from sa2jax.convert.voice_analysis import ConvertedNetwork
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError, FileError, VoiceError
from sa2jax.files.limits import ONNX
from sa2jax.files.raw import read_bytes
from sa2jax.speech.layout import ANALYSIS, KIND, VOICES, YAML, is_converted, is_official
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.voices import SUFFIX, Voice
from sa2jax.speech_config import Token2WavConfig

NEVER_RELEASED: dict[str, Any] = {"form": {}, "folded": ()}
NO_RELEASED_FORM = "was trained from nothing: there is no released form that it could have"


def is_standalone(folder: str | Path) -> bool:
    """Whether a folder holds a detokenizer and no language model."""
    folder = Path(folder)
    return is_converted(folder) or (is_official(folder) and not (folder / "config.json").exists())


class ConvertedDetokenizer:
    """A converted detokenizer, by leaf; nothing is read before it is asked for.

    Args:
        folder: made by `convert_into` or `convert`.

    Attributes:
        folder: the same.
        config: sizes of all networks.
        tensors: shape and dtype of every leaf by dotted path, such as `flow.table`.
        sources: those of every tensor of the released form, by network and released name.
        folded: leaves that a fold made.
        form: of each network, what its released file alone told; empty if it was never released,
            but trained from nothing.

    Raises:
        CheckpointError: if it is damaged or no converted detokenizer.
        ConfigError: if the sizes in it are not understood.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        info = checkpoint.read_info(folder)
        if info.get("kind") != KIND:
            raise CheckpointError(f"{folder} is no detokenizer: expected a converted token2wav")
        self._leaves = checkpoint.open_leaves(folder)
        self._stored: dict[str, StoredTensors] = {}
        self.sources: dict[str, TensorInfo] = {}
        try:
            self.config = Token2WavConfig.from_dict(info["config"])
            released = info.get("source", NEVER_RELEASED)
            self.form, self.folded = released["form"], frozenset(released["folded"])
            shapes = {f"{n}.{leaf}": s for n in NETWORKS for leaf, s in self._shapes(n).items()}
            stored = {name: tuple(leaf.shape) for name, leaf in self._leaves.items()}
            checkpoint.require_fit(self.folder, stored, shapes)
            for name in self.form:
                self._add(name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / checkpoint.INFO} is damaged ({error!r}): convert it again"
            ) from None
        self.tensors = {
            name: TensorInfo(tuple(leaf.shape), leaf.dtype.numpy_dtype)
            for name, leaf in self._leaves.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the released form."""
        return sum(info.nbytes for info in self.sources.values())

    def get(self, name: str) -> np.ndarray:
        """Read one leaf."""
        return transfer.read_stored(self._leaves[name], f"{KIND}.{name}")

    def drop(self, name: str) -> None:
        """Nothing is kept."""

    def released(self, name: str) -> tuple[dict[str, TensorInfo], StoredTensors]:
        """The tensors of one network as they were released: what they were, and where to read."""
        stored, prefix = self._stored[name], f"{name}."
        return {n: self.sources[prefix + n] for n in stored.tensors}, stored

    def network(self, name: str) -> ConvertedNetwork[Any]:
        """One of the networks whose released file is an .onnx, whole."""
        path, prefix = _graph(self.folder, name), f"{name}."
        try:
            graph = read_bytes(path, ONNX)
        except FileError as error:
            raise CheckpointError(
                f"cannot read {path} ({error.reason}): the folder is damaged, convert it again"
            ) from None
        leaves = [leaf for leaf in self._leaves if leaf.startswith(prefix)]
        flat = {leaf.removeprefix(prefix): self.get(leaf) for leaf in leaves}
        return ConvertedNetwork(getattr(self.config, name), checkpoint.unflatten(flat), graph)

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        return NETWORKS[name].shapes(getattr(self.config, name))

    def _add(self, name: str) -> None:
        """Show one network as it was released."""
        leaves = {leaf: self._leaves[f"{name}.{leaf}"] for leaf in self._shapes(name)}
        form = self.form[name]
        stored = StoredTensors(leaves, NETWORKS[name].rules(getattr(self.config, name), form))
        tensors = stored.tensors
        if "dtypes" in form:
            dtypes = transfer.unpack_dtypes(form["dtypes"], tensors)
            tensors = {n: TensorInfo(t.shape, dtypes[n]) for n, t in tensors.items()}
        self._stored[name] = stored
        self.sources |= {f"{name}.{tensor}": info for tensor, info in tensors.items()}


def open_folder(folder: str | Path) -> OfficialDetokenizer | ConvertedDetokenizer:
    """A detokenizer's folder of either kind."""
    return OfficialDetokenizer(folder) if is_official(folder) else ConvertedDetokenizer(folder)


def convert_into(source: OfficialDetokenizer, out: Path, progress: Progress) -> list[str]:
    """Write a released detokenizer in our form.

    Args:
        source: the detokenizer.
        out: folder to make, inside `atomic_io.new_folder`.
        progress: called with (bytes_done, bytes_total).

    Returns:
        Files of the source that were not taken along, relative to it.
    """
    out.mkdir(exist_ok=True)
    leaves = {name: (info.shape, info.dtype) for name, info in source.tensors.items()}
    arrays = checkpoint.create(out / checkpoint.PARAMS, leaves)
    done = 0
    for name, network in source.networks():
        part = {leaf: arrays[f"{name}.{leaf}"] for leaf in network.plan.leaves}
        transfer.write(network.plan, part, part_progress(progress, done, source.bytes))
        done += network.plan.bytes
        if network.strip:
            _graph(out, name).write_bytes(network.strip())
    analysis = {name: leaf for name, leaf in arrays.items() if name.startswith(ANALYSIS)}
    info = {
        "format": checkpoint.FORMAT,
        "kind": KIND,
        "config": source.config.to_dict(),
        "analysis": checkpoint.content_hash(checkpoint.unflatten(analysis)),
        "source": {"form": source.form, "folded": sorted(source.folded)},
    }
    text = json.dumps(info, indent=2) + "\n"
    (out / checkpoint.INFO).write_text(text, encoding="utf-8")
    return transfer.copy_side_files(source.folder, out, _converted_files(official=True))


def supply_voices(folder: Path, old: Path) -> list[str]:
    """Give a model its voices: those made before it was converted anew, and its recordings.

    Args:
        folder: the converted model, not yet in its place.
        old: its place.

    Returns:
        A note for each voice that was lost, and each recording in assets/ that became none.
    """
    speech, notes = SpeechFolder(folder), []
    for path in sorted((old / VOICES).glob(f"[!.]*{SUFFIX}")):
        try:
            kept = Voice.load(path).analysis_hash == speech.analysis_hash
        except VoiceError as error:
            notes.append(f"not kept: {error}")
            continue
        if kept:
            (folder / VOICES).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / VOICES / path.name)
        else:
            notes.append(f"voice {path.stem} was analysed by other weights: not kept")
    return notes + speech.add_recordings()


def export_into(source: ConvertedDetokenizer, out: Path, progress: Progress) -> list[str]:
    """Write a converted detokenizer in the released form; see `convert_into`, its inverse.

    Raises:
        CheckpointError: if the source is damaged, or the onnx package is missing.
    """
    out.mkdir(exist_ok=True)
    done = 0
    for name, part in NETWORKS.items():
        tensors, stored = source.released(name)
        if part.write:
            part.write(out / part.file, source.network(name))
        else:
            torch_file.write(out / part.file, tensors, stored.get)
        done += sum(info.nbytes for info in tensors.values())
        progress(done, source.bytes)
    (out / YAML).write_text(source.config.flow.to_yaml(), encoding="utf-8")  # if there is none
    return transfer.copy_side_files(source.folder, out, _converted_files(official=False))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a detokenizer that stands alone; see `hf.convert`."""
    started, official = time.perf_counter(), OfficialDetokenizer(source)
    with atomic_io.new_folder(out, overwrite=overwrite, sources=(source,)) as folder:
        atomic_io.need_space(folder, official.bytes)
        left_out = convert_into(official, folder, part_progress(progress, 0, official.bytes))
        notes = official.notes + supply_voices(folder, Path(out))
    return transfer.make_report(official.sources, official.bytes, started, left_out, notes)


def export(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Export a detokenizer that stands alone; see `hf.export`."""
    started, ours = time.perf_counter(), ConvertedDetokenizer(source)
    if not ours.form:
        raise CheckpointError(f"{source} {NO_RELEASED_FORM}")
    with atomic_io.new_folder(out, overwrite=overwrite, sources=(source,)) as folder:
        atomic_io.need_space(folder, ours.bytes)
        left_out = export_into(ours, folder, part_progress(progress, 0, ours.bytes))
    return transfer.make_report(ours.sources, ours.bytes, started, left_out)


def _graph(folder: Path, name: str) -> Path:
    return folder / f"{name}.graph"


def _converted_files(*, official: bool) -> set[str]:
    """What is converted, in a folder of either kind; the rest are side files."""
    if official:
        return set(FILES) - {YAML}
    graphs = {_graph(Path(), name).name for name in NETWORKS}
    return {checkpoint.INFO, checkpoint.PARAMS, *graphs}
