"""Several processes of one run: what they hand each other, and how they end."""

import pytest

from tests.two_processes import twice

GATHERS_AND_ENDS = """
import atexit
from torch import distributed
atexit.register(lambda: print("in a group at the end:", distributed.is_initialized()))  # the last to be called
from library.config.processes import share_of_process
share = share_of_process()
print(share.gathered(f"item {share.index}"))
raise SystemExit(3)
"""


@pytest.mark.heavy
def test_processes_gather_alike_and_have_left_their_group_when_they_end():
    statuses, out, err = twice(["-c", GATHERS_AND_ENDS])
    assert statuses == [3, 3], err
    assert out.splitlines() == 2 * ["['item 0', 'item 1']", "in a group at the end: False"]
