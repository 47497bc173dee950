"""A local Hub, and clients of it: in this process (`hub`), or in a fresh Python (`client`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import diffusers.loaders.lora_base
import diffusers.utils.hub_utils
import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants, file_download, hf_api, repocard
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars, get_session

from .server import HubServer


class Client:
    """This process as a client of a server; HF_HUB_OFFLINE and every other setting are back after the test."""

    def __init__(self, server: HubServer, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.server, self.home, self._patch = server, home, patch
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_URL_HOSTS": constants.HF_URL_HOSTS | {urlsplit(server.endpoint).hostname},
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        }.items():
            patch.setattr(constants, name, value)
        (home / ".agent_harnesses.json").write_text("{}")  # so that nobody asks the server for it
        patch.setattr(hf_api.api, "endpoint", server.endpoint)
        if hasattr(_http, "_HUB_ORIGINS"):  # huggingface_hub 2
            patch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(server.endpoint)})
        patch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=self._post))
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # it remembers the endpoint
        hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        for module in (_http, file_download):
            patch.setattr(module, "time", hurried)  # no pauses between retries
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        self.new_cache()
        self.offline(False)
        self.login("hf_user")

    def _post(self, url: str, **arguments: Any) -> Any:
        # huggingface_hub 1 validates cards at the real Hub, whatever the endpoint.
        return get_session().post(url.replace("https://huggingface.co", self.server.endpoint), **arguments)

    def login(self, token: str | None) -> None:
        """Use another token from now on, or none."""
        self._patch.delenv("HF_TOKEN", raising=False)
        if token:
            self._patch.setenv("HF_TOKEN", token)

    def offline(self, offline: bool = True) -> None:
        """What HF_HUB_OFFLINE=1 (or 0) does in a fresh process."""
        self._patch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        for module in (constants, diffusers.loaders.lora_base, diffusers.utils.hub_utils):
            self._patch.setattr(module, "HF_HUB_OFFLINE", offline)

    def new_cache(self) -> Path:
        """Begin with an empty cache, as on another machine."""
        folder = self.home / f"cache-{sum(1 for _ in self.home.glob('cache-*'))}"
        folder.mkdir()
        self._patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        return folder


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub without repositories; users `user` (tokens hf_user, hf_reader) and `other` (hf_other)."""
    with HubServer() as running:
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """This process as a client of `hub.server`, logged in as `user`, with an empty cache."""
    home = tmp_path / "hf_home"
    home.mkdir()
    huggingface_hub.close_session()
    disable_progress_bars()
    yield Client(server, home, monkeypatch)
    enable_progress_bars()
    huggingface_hub.close_session()


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a fresh process whose Hub is `server`; keywords are environment variables, None unsets."""

    def run(code: str, **env: str | None) -> subprocess.CompletedProcess[str]:
        settings: dict[str, Any] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "hf_home_of_client"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_user",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            **env,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=120)

    return run
