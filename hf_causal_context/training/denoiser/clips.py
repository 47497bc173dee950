"""How many frames the clips of a run have."""

from __future__ import annotations

from typing import cast

from datasets import Dataset

from ...bases.diffusion_base import DiffusionBase
from ...data import InterventionalData
from ...data.look_alikes import examples
from ...errors import UserValueError
from ...media.videos import count_frames
from ...messages.progress import ProgressBar
from ..arguments import TrainingArguments
from .rows import undecoded


def clip_length(base: DiffusionBase, data: InterventionalData, arguments: TrainingArguments) -> int | None:
    """Return how many frames of each clip are trained on; None for bases of images.

    Raises:
        ValueError: for videos and a base of images, or a number that the base does not take or images do not have.
    """
    if data.has_videos and not base.is_video:
        raise UserValueError(
            f"The data holds videos, and {type(base.pipe).__name__} makes images. Take a base of videos, such as a "
            "WanPipeline, or images."
        )
    base.check_frames(arguments.num_frames)
    if not base.is_video:
        return None
    if not data.has_videos and (arguments.num_frames or 1) > 1:
        raise UserValueError(
            f"--num_frames={arguments.num_frames}, but the data are images, which are clips of 1 frame. Leave it out, "
            "or give videos: files such as .mp4, or folders with one image per frame inside of the context's folder."
        )
    return arguments.num_frames or (base.default_frames if data.has_videos else 1)


def check_clips(data: InterventionalData, num_frames: int | None) -> None:
    """Refuse clips with fewer frames than are trained on; those of streams are refused when they are read.

    Raises:
        ValueError: naming some of them.
    """
    if num_frames is None or not data.has_videos or data.streaming:
        return
    short: list[str] = []
    for rows in (data.rows, *data.held_out.values()):
        clips = undecoded(cast(Dataset, rows), data.content_column)
        for number, clip in enumerate(ProgressBar(clips, desc="count frames")):
            if (frames := count_frames(clip)) < num_frames:
                short.append(f"{clip['path'] or f'row {number}'} ({frames})")
    if short:
        raise UserValueError(
            f"{len(short)} clips have fewer frames than num_frames={num_frames}: {examples(short)}. "
            "Lower --num_frames, or remove them."
        )
