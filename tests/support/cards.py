"""Two made-up GPUs for a user's project, whose servers are of CPU builds all the same."""

from __future__ import annotations

from support.project import Project

UUIDS = ("GPU-11111111-aaaa", "GPU-22222222-bbbb")

CONFTEST = """
import pytest_llmperf.build.devices as devices
import pytest_llmperf.gpu.cards as cards

CARDS = tuple(
    cards.Gpu(index=index, uuid=uuid, name="Made-up", total_mib=16000, driver="1")
    for index, uuid in enumerate({uuids})
)
# Before any module takes these names over: this is read first, in every worker too.
cards.gpus = cards.all_gpus = lambda: CARDS
devices.devices_of = lambda _build: (devices.Device("CUDA0", "Made-up", 16000, 15000),)
"""

CONFIGS = """
[configs.left]
model = "tiny"
gpu = true
exclusive = false
options = { threads = 1, ctx-size = 512, gpu-layers = 0 }

[configs.right]
extends = "left"
options = { cache-type-k = "q8_0" }

[configs.both]
extends = "left"
gpus = 2

[configs.many]
extends = "left"
gpus = 3
"""


def give_cards(project: Project) -> None:
    """Have all runs of a project see two GPUs, and add configs that take them."""
    project.write("conftest.py", CONFTEST.format(uuids=UUIDS))
    suite = project.path / "suites" / "llmperf.toml"
    suite.write_text(suite.read_text("utf-8") + CONFIGS, "utf-8")
