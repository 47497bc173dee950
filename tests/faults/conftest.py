"""Training runs in processes of their own, tiny pipelines and a local Hub: the fixtures of the neighboring folders."""

from ..hub.conftest import hub, server
from ..training.conftest import on_cpu, pipeline_folder, small_disk, start, together

__all__ = ["hub", "on_cpu", "pipeline_folder", "server", "small_disk", "start", "together"]
