"""Options that commands share: which model, and how it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Attention, Devices, ModelDtype

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Devices):
    """Which model to use, and how."""

    model: Path | None = None
    """Model folder made by `sa2jax convert`, a Hugging Face folder, or `nano`; by default the
    latter, a small model for demonstrations, where the installation has it."""
    dtype: ModelDtype | None = None
    """Dtype of weights and computation; by default bfloat16, float32 on a CPU. int8 is that of
    the matrices alone."""
    int8_cache: bool = False
    """Keep what was read as int8: half the memory for long or many conversations."""
    attention: Attention | None = None
    """What computes the decoder's attention; by default chosen by platform and shapes. One that
    cannot is refused."""
    tokenizer: Path | None = None
    """Folder of the tokenizer files, if not the model's own."""
    detokenizer: Path | None = None
    """Folder of the detokenizer and its voices, if not the model's own."""
    prompt_style: Literal["chat", "base"] = "chat"
    """`base` for a pre-trained model that knows no turns."""
    batch_size: int = 8
    """Prompts that are answered at once."""

    def load(self) -> "StepAudio2":
        """Read the model, with a progress bar."""
        self.join_hosts()
        from sa2jax.pipeline import StepAudio2

        model = common.model_or_default(self.model)
        with common.progress_bar("loading") as progress:
            return StepAudio2.from_pretrained(
                model,
                dtype=self.dtype,
                mesh=self.mesh,
                int8_cache=self.int8_cache,
                attention=self.attention,
                tokenizer=self.tokenizer,
                speech=self.detokenizer,
                prompt_style=self.prompt_style,
                batch_size=self.batch_size,
                progress=progress,
            )


Model = Annotated[ModelOptions, tyro.conf.arg(name="")]
