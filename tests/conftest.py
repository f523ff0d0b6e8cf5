import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when the kernels are imported: without a GPU they run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# Machines are shared: how long drawing takes says nothing about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_collection_modifyitems(items):
    # Tests that launch ranks take turns in one worker: two at once would wait for each other's
    # cores, and some measure how long a rank is silent.
    for item in items:
        if {"launch", "Launch", "train"} & vars(item.module).keys():
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Eight small documents of very unequal length."""
    root = tmp_path_factory.mktemp("corpus")
    for i, size in enumerate([3, 700, 41, 1, 260, 55, 120, 17]):
        (root / f"{i}.txt").write_text(("the ring goes round " * 40)[i : i + size])
    return f"data.root={root}"
