"""The engine of generation: prompts in, token ids out, many at a time.

engine.generate(requests, options)                 # all replies
for ids in engine.submit(request, options): ...    # one, as it comes

Batches, conversations, streams and servers all run on it: requests join and leave a batch of rows
between blocks of steps, see `scheduler`; a reply does not depend on who else is there. One thread
of its own runs the programs.
"""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sa2jax import sharding
from sa2jax.config import StepAudio2Config
from sa2jax.errors import PromptError
from sa2jax.inference.generation import DecodeText, Generation
from sa2jax.inference.loop import DeviceLoop
from sa2jax.inference.programs import MAX_STOP_IDS
from sa2jax.inference.requests import Completion, GenerationConfig, Request, validate_request
from sa2jax.inference.runner import MEL_BUCKETS, Clip, ModelRunner
from sa2jax.inference.scheduler import Scheduler
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params

BLOCK = 5  # steps: a word and its four codes
MAX_ROWS = 8


class Engine:
    """Generates replies with one model.

    Args:
        model: the model's structure.
        params: its parameters.
        cfg: its config.
        mesh: the mesh the parameters are sharded over, if any.
        rows: replies at a time, at most; others wait.
        block: steps of a compiled call.
        parity: let the clips of a prompt feel each other's lengths as in the official code.
    """

    def __init__(
        self,
        model: Functional[StepAudio2Model],
        params: Params,
        cfg: StepAudio2Config,
        *,
        mesh: Mesh | None = None,
        rows: int = MAX_ROWS,
        block: int = BLOCK,
        parity: bool = False,
    ):
        self.cfg, self.mesh, self.parity = cfg, mesh, parity
        self.runner = ModelRunner(model, params, cfg, mesh=mesh, parity=parity)
        self.scheduler = Scheduler(self.runner, max_rows=rows, block=block)
        self.loop = DeviceLoop()
        weakref.finalize(self, self.loop.close)

    @property
    def params(self) -> Params:
        """The model's parameters."""
        return self.runner.params

    def generate(
        self,
        requests: Sequence[Request],
        options: GenerationConfig,
        *,
        prompt_indices: Sequence[int] | None = None,
        decode_text: DecodeText | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Continue prompts of any lengths.

        Args:
            requests: the prompts.
            options: how to continue them.
            prompt_indices: index of each prompt: what it draws depends on this and the seed, and
                errors name it; by default its place in the list.
            decode_text: ids to text, needed for stop strings.
            progress: called with (prompts done, prompts in all).

        Returns:
            For each prompt its `options.samples` replies.

        Raises:
            PromptError: if a prompt is empty, leaves no room in the model's context, holds an
                unknown id, or has clips that do not fit their places.
        """
        if options.stop_strings and decode_text is None:
            raise PromptError("stop strings need decode_text to turn ids into text")
        prompt_indices = range(len(requests)) if prompt_indices is None else prompt_indices
        for index, request in zip(prompt_indices, requests, strict=True):
            self._check(request, options, index)
        replies = [
            [
                Generation(
                    request,
                    options,
                    prompt_index=index,
                    sample_index=sample,
                    decode_text=decode_text,
                    wake=self._wake,
                )
                for sample in range(options.samples)
            ]
            for index, request in zip(prompt_indices, requests, strict=True)
        ]
        found: list[list[Completion]] = []
        try:
            self._submit([reply for samples in replies for reply in samples])
            for samples in replies:
                found.append([reply.result() for reply in samples])
                if progress is not None:
                    progress(len(found), len(requests))
        finally:
            for reply in (reply for samples in replies[len(found) :] for reply in samples):
                reply.close()
        return found

    def submit(
        self,
        request: Request,
        options: GenerationConfig,
        *,
        prompt_index: int = 0,
        conversation: object | None = None,
    ) -> Generation:
        """Continue the prompt of a conversation, whose next prompt reads only what is new.

        Args:
            request: the whole conversation up to here.
            options: how to continue it; `samples` must be 1. Stop strings are the caller's to see.
            prompt_index: what is drawn depends on it and on the seed.
            conversation: something that stands for the conversation and lives as long; without it
                prompts are told apart by what they say.

        Raises:
            PromptError: for a prompt that does not fit the model, see `generate`.
        """
        if options.samples != 1:
            raise PromptError("a conversation has one reply: expected samples=1")
        self._check(request, options, prompt_index)
        reply = Generation(
            request,
            options,
            prompt_index=prompt_index,
            keep=True,
            conversation=conversation,
            wake=self._wake,
        )
        self._submit([reply])
        return reply

    def reserve(self, rows: int, slots: int) -> None:
        """Have so many rows and slots from now on, whether something needs them or not.

        Args:
            rows: replies at a time.
            slots: positions of the longest conversation, reply included.
        """
        self._run(partial(self.scheduler.reserve, rows, slots, keep=True))

    def warm_up(
        self,
        progress: Callable[[int, int], None] | None = None,
        *,
        clip_frames: int = MEL_BUCKETS[-1],
    ) -> None:
        """Compile all that the reserved rows can need, before anything is under way.

        Args:
            progress: called with (programs done, programs in all).
            clip_frames: mel frames of the longest clip that will be heard, 10 ms each.
        """

        def run() -> None:
            self.scheduler.forget()
            for count in self.runner.warm_up(self.scheduler.block, clip_frames=clip_frames):
                if progress is not None:
                    progress(*count)

        self._run(run)

    def forget(self) -> None:
        """Forget what was read of all conversations; replies under way go on."""
        self._run(self.scheduler.forget)

    def logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        """Scores of the next token after each position of a prompt."""
        validate_request(0, request, self.cfg)
        return self.runner.logits(request)

    def encode_audio(self, mels: Sequence[Float[np.ndarray, "M L"]]) -> list[Clip]:
        """Audio embeddings of clips, see `ModelRunner.encode_audio`."""
        return self.runner.encode_audio(mels)

    def replica(self, mesh: Mesh | None = None) -> Self:
        """Another engine with the same model, on these devices.

        Args:
            mesh: a part of this one's; by default all of it.
        """
        return type(self)(
            self.runner.model,
            self.params if mesh is None else sharding.replica_of(self.params, mesh),
            self.cfg,
            mesh=mesh or self.mesh,
            rows=self.scheduler.max_rows,
            block=self.scheduler.block,
            parity=self.parity,
        )

    def replicas(self) -> list[Self]:
        """An engine for each index of the mesh's data axis, with the copies that lie there.

        Each works on its own: conversations are dealt out to them. In a multi-host program, those
        of this host.
        """
        return [self.replica(mesh) for mesh in sharding.replicas(self.mesh)] or [self]

    def _check(self, request: Request, options: GenerationConfig, prompt_index: int) -> None:
        validate_request(prompt_index, request, self.cfg)
        if len(options.stop_ids) > MAX_STOP_IDS:
            raise PromptError(
                f"expected at most {MAX_STOP_IDS} stop ids, got {len(options.stop_ids)}"
            )

    def _submit(self, replies: Sequence[Generation]) -> None:
        self.scheduler.submit(replies)
        self._wake()

    def _run(self, task: Callable[[], None]) -> None:
        """Run something between two turns of the scheduler, and wait for it."""
        done: Future[None] = Future()
        self.scheduler.call(task, done)
        self._wake()
        done.result()

    def _wake(self) -> None:
        self.loop.wake(self.scheduler)
