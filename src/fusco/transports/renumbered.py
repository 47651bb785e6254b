"""A store in which exchanges are numbered by group, whatever number the process gives them."""

from __future__ import annotations

from datetime import timedelta

from torch._C._distributed_c10d import Store


class RenumberedStore(Store):
    """Passes keys of the form `name/number/rank` on with numbers of its own.

    torch numbers the exchanges of symmetric memory by process, over all groups. Ranks that have
    made different numbers of them, since they are in other groups too, would wait for each other
    for ever. Here the first number that comes is 0, the next 1, and so on, on every rank, in each
    round: one that fails has made fewer exchanges than its peers, and begins the next with them.

    Args:
        store: where to.
        timeout_s: bound of a wait that names none, seconds.
    """

    def __init__(self, store: Store, timeout_s: float) -> None:
        super().__init__()
        self._store = store
        self._timeout = timedelta(seconds=timeout_s)
        self._numbers: dict[str, int] = {}
        self._round = 0

    def begin_round(self) -> None:
        """All ranks begin the same rounds."""
        self._round += 1
        self._numbers.clear()

    def set(self, key: str, value: str) -> None:
        self._store.set(self._renumbered(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._renumbered(key))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait([self._renumbered(key) for key in keys], timeout or self._timeout)

    def _renumbered(self, key: str) -> str:
        name, number, rank = key.rsplit("/", 2)
        own = self._numbers.setdefault(number, len(self._numbers))
        return f"{name}/{self._round}.{own}/{rank}"
