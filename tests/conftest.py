"""What several rooms of the tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_draws_in_any_order() -> None:
    """torch's own generator, whichever tests ran before: some draw from it."""
    torch.manual_seed(0)
