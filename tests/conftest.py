"""What several rooms of the tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def alike_in_any_order() -> None:
    """torch's own generator, from which some draw, whichever tests ran before; and one thread, as
    tests run side by side and their tensors are small.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
