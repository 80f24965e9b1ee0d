"""A question and its answer as a plot: waves and mel spectra."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE

if TYPE_CHECKING:
    from sa2jax.audio import AudioSource
    from sa2jax.pipeline.reply import Reply

SHORTEST = 720  # samples that have no spectrum
LOWEST, HIGHEST = -11.5, 2.0  # of the mel spectra shown, natural logarithm of magnitudes
Plotter = Callable[["Reply", Sequence["AudioSource"]], None]


def make_plotter(path: Path) -> Plotter:
    """A function that draws an answer into a PNG file; what would prevent it is an error at once.

    Args:
        path: the plot.

    Raises:
        AudioError: for another suffix or a missing folder, or if matplotlib is not installed.
    """
    from sa2jax.errors import AudioError

    if path.suffix.lower() != ".png":
        raise AudioError(f"expected a plot's name to end in .png, got {path}")
    if not os.path.isdir(path.absolute().parent):
        raise AudioError(f"no folder {path.parent}: make it first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise AudioError("--plot needs matplotlib: pip install 'sa2jax[train]'") from None

    def draw(reply: "Reply", questions: Sequence["AudioSource"]) -> None:
        from sa2jax import audio
        from sa2jax.atomic_io import disk_errors, new_file

        panels = [
            (f"question: {Path(source.name).name}", audio.load_audio(source, SPEECH_SAMPLE_RATE))
            for source in questions
        ]
        panels.append((f"answer: {reply.text}" if reply.text else "answer", reply.audio))
        figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(panels), squeeze=False, height_ratios=(1, 2))
        for column, (title, wave) in zip(axes.T, panels, strict=True):
            _draw_sound(column, title, wave)
        times = reply.timings
        if times is not None and times.real_time_factor is not None:
            figure.suptitle(
                f"{times.speech:.1f} s of speech made in {times.total:.1f} s, compilation included",
                fontsize="medium",
            )
        with disk_errors(path), new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)

    return draw


def _draw_sound(column: Sequence[Any], title: str, wave: Float[np.ndarray, " N"]) -> None:
    """A wave above its mel spectrum, over the same seconds."""
    from sa2jax.audio.features import mel_24k

    above, below = column
    above.plot(np.arange(len(wave)) / SPEECH_SAMPLE_RATE, wave, linewidth=0.5, color="#3b6ea5")
    above.set(title=title, ylim=(-1, 1), xlim=(0, max(len(wave), 1) / SPEECH_SAMPLE_RATE))
    above.tick_params(labelbottom=False)
    below.set(xlabel="seconds", ylabel="mel band")
    if len(wave) > SHORTEST:
        mel = mel_24k(wave)
        below.imshow(
            mel,
            origin="lower",
            aspect="auto",
            vmin=LOWEST,
            vmax=HIGHEST,
            cmap="magma",
            extent=(0, len(wave) / SPEECH_SAMPLE_RATE, 0, len(mel)),
        )
