"""How the processes of a run find one another in a store that others may have used before them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store

from draftplus.errors import Stalled

BETWEEN_LOOKS = 0.05  # seconds


def agreed_name(store: Store, rank: int, size: int, patience: float) -> str:
    """A name that only these processes know, and none of those before them.

    torchrun keeps its store when it starts processes again, with all that those before left in it, such as addresses
    at which nobody listens any more; and each of several torchruns counts its restarts for itself.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + patience

    def pause(missing: Sequence[int]) -> None:
        if time.monotonic() > end:
            names = ", ".join(map(str, missing))
            raise Stalled(f"{len(missing)} of {size} processes did not start in {in_minutes(patience)}: rank {names}")
        time.sleep(BETWEEN_LOOKS)

    if rank == 0:
        while missing := [other for other in range(1, size) if not store.check([f"{mine}/{other}"])]:
            for other in missing:
                if store.check([f"hello/{other}"]):  # which may be an earlier one's
                    store.set(f"answer/{store.get(f'hello/{other}').decode()}", mine)
            pause(missing)
        return mine
    store.set(f"hello/{rank}", mine)
    while not store.check([f"answer/{mine}"]):
        pause([0])
    name = store.get(f"answer/{mine}").decode()
    store.set(f"{name}/{rank}", "")
    return name


def in_minutes(seconds: float) -> str:
    """Seconds as parallel.timeout counts them."""
    minutes = seconds / 60
    return f"{minutes:g} minute{'s' * (minutes != 1)}"
