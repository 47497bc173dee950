"""How to install this package, as cards and messages say it: the one place that its first release changes."""

from __future__ import annotations

ON_PACKAGE_INDEX = False


def installation(extra: str = "", *, upgrade: bool = False) -> str:
    """Return pip's command that installs this package, with one of its extras."""
    command = "pip install --upgrade" if upgrade else "pip install"
    extras = f"[{extra}]" if extra else ""
    if ON_PACKAGE_INDEX:
        return f'{command} "hf-causal-context{extras}"'
    where = f"{'a new' if upgrade else 'a'} clone of hf_causal_context's repository"
    return f'{command} ".{extras}"  # in {where}: it is not on the package index yet'
