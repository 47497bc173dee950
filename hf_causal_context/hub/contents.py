"""What card.json holds: all that a card is made of, besides the files of the training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import CARD_CONTENTS, complete_or_absent
from ..errors import UserValueError

CHAT_PROMPT = "Tell me a short story."  # what cards ask a chat model where nobody gives a prompt
STRENGTHS = (0.0, 0.5, 1.0, 1.5)  # columns of the image of strengths


@dataclass(frozen=True)
class CardContents:
    """What card.json holds: how the samples on the card were made, and where they are in the folder.

    Attributes:
        name: what the code on the card loads: the adapter's folder or repository.
        library: "diffusers" or "transformers".
        base: Hub id of the base, or a folder.
        pipeline_tag: the Hub's name of the task.
        call: arguments of the call that makes a sample.
        class_label: of a class-conditional denoiser whose pipeline has no argument for it.
        inputs: Python code that makes a language model's inputs.
        auto_class: class of PEFT that loads a language model.
        revision, variant, dtype: of the base.
        seed: of the samples.
        prompt: of the samples; None for bases that take none.
        descriptions: concept -> what it means, in the author's words.
        samples: context -> path of its image, or its text.
        grid, strengths, influence: paths of images, None where there is none.
        loras: context -> path of its plain LoRA.
        lora_format: "diffusers" or "peft".
        denoiser: the name in the pipeline of what LoRAs of the format "peft" are for.
        without_loras: why there are none.
        frame_rate: of a base of videos, None for other bases.
        license: the Hub's name of a license.
    """

    name: str
    library: str
    base: str
    pipeline_tag: str
    call: dict[str, Any] = field(default_factory=dict)
    class_label: int | None = None
    inputs: str | None = None
    auto_class: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"
    seed: int = 0
    prompt: str | None = None
    descriptions: dict[str, str] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    grid: str | None = None
    strengths: str | None = None
    influence: str | None = None
    loras: dict[str, str] = field(default_factory=dict)
    lora_format: str | None = None
    denoiser: str | None = None
    without_loras: str | None = None
    frame_rate: int | None = None
    license: str | None = None

    def save(self, folder: Path) -> None:
        """Write card.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        with complete_or_absent(folder / CARD_CONTENTS) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CardContents:
        """Read card.json.

        Raises:
            FileNotFoundError: without one.
            ValueError: for one that is damaged, or that another version wrote.
        """
        try:
            return cls(**json.loads((folder / CARD_CONTENTS).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise UserValueError(
                f"{folder / CARD_CONTENTS} is not what this version writes ({error}). Make the folder again with "
                "`hf-causal-context push`."
            ) from error
