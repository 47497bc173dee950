"""A Space for one adapter: its Hub id in the variable ADAPTER, or its files in the folder `adapter` beside this file.

BASE is needed only where the adapter does not name its base, or names a folder of another machine.
"""

import os
from pathlib import Path

from hf_causal_context.demo.page import demo_or_reason, launch

adapter = os.environ.get("ADAPTER") or str(Path(__file__).parent / "adapter")
demo = demo_or_reason(adapter, os.environ.get("BASE"))

if __name__ == "__main__":
    launch(demo)
