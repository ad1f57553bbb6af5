"""One batch through LDBFRPipeline, with previews on the way, as long as somebody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ldbfr.errors import LDBFRError
from ldbfr.images import Pixels, to_uint8
from ldbfr.memory import is_out_of_memory, release_memory
from serve.batching import Waiting
from serve.protocol import FacePreview, FaceResult, ModelInfo

if TYPE_CHECKING:
    from ldbfr.pipeline import LDBFRPipeline, StepCallback


class AbandonedError(Exception):
    """Nobody waits for the batch any more."""


class BrokenDeviceError(RuntimeError):
    """The GPU does not answer this process any more; nothing is wrong with the faces."""


Outcome = FaceResult | Exception


@dataclass
class BatchRunner:
    """Restores batches; only one thread may call it.

    Args:
        pipeline: the model.
        info: about it.
        most: faces at a time; halved for good when the memory does not suffice.
    """

    pipeline: LDBFRPipeline
    info: ModelInfo
    most: int

    def __call__(self, batch: Sequence[Waiting]) -> list[Outcome]:
        """Restore faces that agree in their sampling: a result or an error for each of the batch.

        A batch that the model refuses is tried again one by one, so that only the culprit fails.

        Raises:
            AbandonedError: nobody waits any more.
            BrokenDeviceError: the process cannot go on.
        """
        try:
            return list(self.restore(batch))
        except (LDBFRError, RuntimeError) as error:  # torch raises RuntimeError
            if "CUDA error" in str(error):
                raise BrokenDeviceError(str(error)) from error
            if len(batch) == 1:
                return [error]
            return [self.alone(one) for one in batch]

    def alone(self, one: Waiting) -> Outcome:
        """What becomes of one of a batch that the model refused."""
        try:
            return self([one])[0]
        except AbandonedError as error:
            return error

    def restore(self, batch: Sequence[Waiting]) -> list[FaceResult]:
        """The results of a batch.

        Raises:
            AbandonedError: as above.
            RuntimeError: of torch.
            InputError: the model gave no numbers.
        """
        started = time.monotonic()
        watch = Watch(self.pipeline, batch)
        watch.first_stage(self.first_stage)
        faces = np.concatenate([one.faces for one in batch])
        images, samples, uncertainty = self.run(faces, watch, watch.after_step)
        seconds = time.monotonic() - started
        results = []
        for one, part in zip(batch, parts(batch), strict=True):
            results.append(
                FaceResult(
                    images[part],
                    self.info,
                    None if samples is None else samples[:, part],
                    None if uncertainty is None else uncertainty[part],
                    queue_seconds=started - one.since,
                    model_seconds=seconds,
                    batch_faces=len(faces),
                )
            )
        return results

    def run(
        self, faces: Pixels, watch: Watch, after_step: StepCallback
    ) -> tuple[Pixels, Pixels | None, np.ndarray | None]:
        """Images (n, S, S, 3), samples (N, n, S, S, 3) and uncertainty (n, S, S), in smaller batches if need be."""
        sampling = watch.sampling
        try:
            output = self.pipeline(
                faces,
                num_inference_steps=sampling.steps,
                seed=sampling.seed,
                condition_scale=sampling.condition_scale,
                num_samples=sampling.samples,
                callback_on_step_end=after_step,
            )
        except (RuntimeError, MemoryError) as error:
            if len(faces) == 1 or not lacks_memory(error):
                raise
        else:
            return output.images, None if output.samples is None else np.stack(output.samples), output.uncertainty
        self.halve(len(faces))
        half = len(faces) // 2
        # Which faces a step's latents belong to is not known any more, so previews end; it can still be abandoned.
        first, second = (self.run(part, watch, lambda *_: watch.check()) for part in (faces[:half], faces[half:]))
        return (
            np.concatenate([first[0], second[0]]),
            None if first[1] is None or second[1] is None else np.concatenate([first[1], second[1]], axis=1),
            None if first[2] is None or second[2] is None else np.concatenate([first[2], second[2]]),
        )

    def first_stage(self, faces: Pixels) -> Pixels:
        """What DC-VQR alone makes of faces (n, S, S, 3), in smaller batches if need be."""
        try:
            return self.pipeline(faces, num_inference_steps=0).images
        except (RuntimeError, MemoryError) as error:
            if len(faces) == 1 or not lacks_memory(error):
                raise
        self.halve(len(faces))
        half = len(faces) // 2
        return np.concatenate([self.first_stage(part) for part in (faces[:half], faces[half:])])

    def halve(self, count: int) -> None:
        """So many faces were too many; not to be called in an except clause, whose error keeps what is to be freed."""
        self.most = min(self.most, count // 2)
        release_memory()


def lacks_memory(error: Exception) -> bool:
    """Whether this is for want of memory, of a GPU or a CPU."""
    return isinstance(error, MemoryError) or is_out_of_memory(error)


def parts(batch: Sequence[Waiting]) -> list[slice]:
    """Which of a batch's faces belong to whom."""
    ends = np.cumsum([len(one.faces) for one in batch]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class Watch:
    """Looks after a batch between two denoising steps: whether somebody still waits, and who wants to see it."""

    def __init__(self, pipeline: LDBFRPipeline, batch: Sequence[Waiting]) -> None:
        self.pipeline, self.batch = pipeline, batch
        self.sampling = batch[0].sampling
        self.watched = [(one.tell, part) for one, part in zip(batch, parts(batch), strict=True) if one.tell is not None]
        self.steps_done = 0

    def check(self) -> None:
        """Go on only if somebody waits.

        Raises:
            AbandonedError: nobody does.
        """
        if not any(one.is_wanted for one in self.batch):
            raise AbandonedError

    def first_stage(self, restore: Callable[[Pixels], Pixels]) -> None:
        """Show what DC-VQR alone makes of the faces, to those who want to see it."""
        self.check()
        if not self.watched:
            return
        shown = np.concatenate([one.faces for one in self.batch if one.tell is not None])
        images = restore(shown)
        start = 0
        for tell, part in self.watched:
            end = start + part.stop - part.start
            tell(FacePreview(0, self.sampling.steps, images[start:end]))
            start = end

    def after_step(self, step: int, timestep: int, latents: Any) -> None:
        """Called by the pipeline; of several samples the first is shown.

        Raises:
            AbandonedError: nobody waits any more.
        """
        self.check()
        self.steps_done += 1
        if self.steps_done >= self.sampling.steps:
            return  # the result is next, or another sample
        for tell, part in self.watched:
            own = latents[part].to(self.pipeline.dtype)
            images = to_uint8(self.pipeline.latent_vqgan.from_latents(own).clamp(-1, 1).float())
            tell(FacePreview(step + 1, self.sampling.steps, images))
