"""`hf-causal-context check-data`: counts contexts, and says what would spoil a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .._files import complete_or_absent
from .._messages import in_options
from ..data.arguments import AnyDataArguments, argument
from ..errors import UserValueError


@dataclass
class Arguments(AnyDataArguments):
    """Settings of the command."""

    contact_sheet: Path | None = argument(None, "Image file for some images of every context, such as check.png.")


def run(arguments: Arguments) -> None:
    """Print a table of the data, and how far a base is from it if one is named; write a contact sheet if asked for.

    Raises:
        ValueError, OSError: for data or a base that cannot be used, or a file that cannot be written.
    """
    from ..data import check_data
    from ..data.from_arguments import load_any_data
    from ..data.text_rows import columns_of
    from ..training.gap_report import NotMeasuredError, measured
    from .base_gap import gap_of
    from .contact_sheet import contact_sheet

    data, sheet = load_any_data(arguments), arguments.contact_sheet
    if sheet is not None and columns_of(data.content_column):
        raise UserValueError(f"--contact_sheet={sheet} is for images, and the data holds texts. Leave it out.")
    report = check_data(data, num_frames=arguments.num_frames)
    print(in_options(report.table(), vars(arguments)), flush=True)
    report.raise_for_errors()
    if sheet is not None:
        with complete_or_absent(sheet) as unfinished:
            contact_sheet(data, arguments.observational_name).save(unfinished)
        print(f"Look at {sheet}: every row shows a context.", flush=True)
    if arguments.pretrained_model_name_or_path is not None:
        try:
            told = measured(lambda: gap_of(data, arguments)).advice(None)
        except NotMeasuredError as reason:
            told = str(reason)
        print(told)
