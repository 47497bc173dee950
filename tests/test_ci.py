"""What CI says at its end."""

import subprocess
from pathlib import Path

import pytest

SKIPPED = Path(__file__).parents[1] / ".ci" / "skipped"
LOGS = (
    """.....s [100%]
SKIPPED [2] tests/gpu/test_cuda.py:12: needs a GPU
SKIPPED [1] tests/gpu/test_training.py:7: needs a GPU
SKIPPED [1] tests/test_review_chats.py:142: could not import 'gguf': No module named 'gguf'
3 passed, 4 skipped in 1.00s
""",
    "SKIPPED [5] tests/gpu/test_cuda.py:20: needs a GPU\n1 passed, 5 skipped in 1.00s\n",
)


@pytest.fixture
def listed(tmp_path):
    def run(*logs):
        paths = [tmp_path / str(number) for number in range(len(logs))]
        for path, log in zip(paths, logs, strict=True):
            path.write_text(log)
        return subprocess.run([SKIPPED, *paths], capture_output=True, text=True)

    return run


def test_skips_are_listed_by_reason(listed):
    done = listed(*LOGS)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "8 skipped: needs a GPU",
        "1 skipped: could not import 'gguf': No module named 'gguf'",
    ]


def test_where_nothing_is_skipped_nothing_is_listed(listed):
    done = listed("1 passed in 1.00s\n")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_demo_that_no_browser_saw_fails(listed):
    done = listed(LOGS[1], "SKIPPED [1] tests/test_demo.py:274: There is no browser.\n")
    assert done.returncode == 1
    assert "The demo was not tried in a browser. Install chromium" in done.stderr
    reason = (Path(__file__).parent / "test_demo.py").read_text(encoding="utf-8")
    assert 'pytest.skip("There is no browser.")' in reason
