"""`hf-causal-context check-data`: counts contexts, and says what would spoil a training."""

from __future__ import annotations

from .._messages import in_options
from ..data.arguments import AnyDataArguments as Arguments


def run(arguments: Arguments) -> None:
    """Print a table of the data, and how far a base is from it if one is named.

    Raises:
        ValueError, OSError: for data or a base that cannot be used.
    """
    from ..data import check_data
    from ..data.from_arguments import load_any_data
    from .base_gap import gap_of

    data = load_any_data(arguments)
    report = check_data(data)
    print(in_options(report.table(), vars(arguments)), flush=True)
    report.raise_for_errors()
    if arguments.pretrained_model_name_or_path is not None:
        print(gap_of(data, arguments).advice(None))
