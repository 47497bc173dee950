"""`hf-causal-context check-data`: counts contexts, and says what would spoil a training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .._files import complete_or_absent
from ..data.arguments import (
    ComparedDataArguments,
    ImageReadingArguments,
    TextReadingArguments,
    argument,
    refuse_useless,
)
from ..errors import UserValueError
from ..messages.progress import say
from ..messages.wording import in_options

_OF_IMAGES = ("variant", *(field.name for field in fields(ImageReadingArguments)))
_OF_TEXTS = tuple(field.name for field in fields(TextReadingArguments))


@dataclass
class Arguments(ComparedDataArguments):
    """Settings of the command."""

    contact_sheet: Path | None = argument(None, "Image file for some images of every context, such as check.png.")

    def check_kind(self, texts: bool) -> None:
        """Refuse settings of how a base reads rows, where there is none, or where rows are not of their kind.

        Raises:
            ValueError: naming them.
        """
        if self.pretrained_model_name_or_path is None:
            reason = "No base is given (--pretrained_model_name_or_path)"
            refuse_useless(self, ("revision", *_OF_IMAGES, *_OF_TEXTS), reason)
        elif texts:
            refuse_useless(self, _OF_IMAGES, "The data holds texts")
        else:
            refuse_useless(self, _OF_TEXTS, "The data holds images")


def run(arguments: Arguments) -> None:
    """Print a table of the data, and how far a base is from it if one is named; write a contact sheet if asked for.

    Raises:
        ValueError, OSError: for data or a base that cannot be used, or a file that cannot be written.
    """
    from PIL.Image import SAVE, registered_extensions

    from ..data import check_data
    from ..data.from_arguments import load_any_data
    from ..data.text_rows import columns_of
    from ..training.gap_report import NotMeasuredError, measured
    from .base_gap import gap_of
    from .contact_sheet import contact_sheet

    sheet = arguments.contact_sheet
    if sheet is not None and (sheet.is_dir() or registered_extensions().get(sheet.suffix.lower()) not in SAVE):
        raise UserValueError(f"--contact_sheet={sheet} is no file that images are written to, such as check.png.")
    data = load_any_data(arguments)
    texts = bool(columns_of(data.content_column))
    arguments.check_kind(texts)
    if sheet is not None and texts:
        raise UserValueError(f"--contact_sheet={sheet} is for images, and the data holds texts. Leave it out.")
    report = check_data(data, num_frames=arguments.num_frames)
    print(in_options(report.table(), vars(arguments)), flush=True)
    report.raise_for_errors()
    if sheet is not None:
        there = sheet.exists()
        with complete_or_absent(sheet) as unfinished:
            contact_sheet(data, arguments.observational_name).save(unfinished)
        if there:
            say(f"Replaced {sheet}.")
        print(f"Look at {sheet}: every row shows a context.", flush=True)
    if arguments.pretrained_model_name_or_path is not None:
        try:
            told = measured(lambda: gap_of(data, arguments)).advice(None)
        except NotMeasuredError as reason:
            told = str(reason)
        print(told)
