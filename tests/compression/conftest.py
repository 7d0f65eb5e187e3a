import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random weights, whichever ran before it."""
    torch.manual_seed(1)
