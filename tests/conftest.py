import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Eight small documents of very unequal length."""
    root = tmp_path_factory.mktemp("corpus")
    for i, size in enumerate([3, 700, 41, 1, 260, 55, 120, 17]):
        (root / f"{i}.txt").write_text(("the ring goes round " * 40)[i : i + size])
    return f"data.root={root}"
