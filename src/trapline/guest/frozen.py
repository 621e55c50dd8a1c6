"""Everything a machine remembers, kept and brought back in microseconds.

The engine and the TDX module save themselves. The host and its devices are plain Python
objects: they are found once by walking from the machine's parts, so that a device added
later is not forgotten, and their attributes are copied.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from trapline.machine.machine import Machine

if TYPE_CHECKING:
    from trapline.cpu.engine import Snapshot
    from trapline.tdx.module import ModuleState

# Where the classes come from whose instances have state of their own.
_STATEFUL: Final = (
    "trapline.machine.devices.",
    "trapline.machine.vmm.",
    "trapline.machine.observe.recorder",
)
_PLAIN: Final = (int, str, bytes, float, bool, type(None), tuple, frozenset)

_PAGE: Final = 4096

Restore = Callable[[], None]


class Checkpoint(NamedTuple):
    """A machine's state some way behind the moment at which it was frozen."""

    engine: "Snapshot"
    module: "ModuleState"
    parts: list[Restore]
    pages: dict[int, bytes]


class FrozenMachine:
    """A machine's state at one moment; `restore` may be called any number of times.

    Making one freezes guest memory: earlier ones can no longer be restored. From then on, who
    writes guest memory without the guest must tell the engine (`Memory.code_changed`).
    """

    def __init__(self, machine: Machine) -> None:
        self._engine = machine.engine
        self._memory = machine.memory
        self._module = machine.module
        self._snapshot: Snapshot = machine.engine.freeze(announced=True)
        self._module_state: ModuleState = machine.module.save()
        self._parts = [*_parts(machine), machine]
        self._restores = self._keep_parts()

    def restore(self) -> None:
        """Bring the machine back."""
        self._engine.restore(self._snapshot)
        self._module.restore(self._module_state)
        for restore in self._restores:
            restore()

    def keep_cpu(self) -> None:
        """From now on bring back the CPU as it is now, with the memory of before."""
        self._snapshot = self._engine.save()

    def checkpoint(self, pages: Iterable[int], before: Checkpoint | None) -> Checkpoint:
        """Keep the state that the machine is in now; `pages` are those written since the start.

        `before` is an earlier checkpoint, if only guest code has run since.
        """
        ram = self._memory.ram
        return Checkpoint(
            self._engine.save(),
            self._module.save() if before is None else before.module,
            self._keep_parts() if before is None else before.parts,
            {page: bytes(ram[page : page + _PAGE]) for page in pages},
        )

    def return_to(self, checkpoint: Checkpoint) -> None:
        """Bring the machine to a checkpoint made since it was frozen."""
        memory = self._memory
        self._engine.restore(checkpoint.engine)
        for page, content in checkpoint.pages.items():
            memory.ram[page : page + _PAGE] = content
            memory.code_changed(page, _PAGE)
        self._module.restore(checkpoint.module)
        for restore in checkpoint.parts:
            restore()

    def _keep_parts(self) -> list[Restore]:
        return [restore for part in self._parts for restore in _keep(part)]


def _parts(machine: Machine) -> list[Any]:
    """Find the stateful objects that can be reached from the machine."""
    seen: dict[int, Any] = {}
    pending: list[Any] = list(vars(machine).values())
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | deque):
            pending += value
        elif _is_stateful(value) and id(value) not in seen:
            seen[id(value)] = value
            pending += vars(value).values()
    return list(seen.values())


def _is_stateful(value: Any) -> bool:  # noqa: ANN401 - any attribute of the model
    return type(value).__module__.startswith(_STATEFUL) and hasattr(value, "__dict__")


def _keep(part: Any) -> Iterator[Restore]:  # noqa: ANN401 - any object of the model
    """Yield what brings each attribute of one object back: fast to call, there are dozens."""
    attributes = vars(part)
    plain = {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)}
    if plain:
        yield partial(attributes.update, plain)
    for name, value in attributes.items():
        restore = _keep_container(value) or _keep_hash(attributes, name, value)
        if restore is not None:
            yield restore


def _keep_container(value: Any) -> Restore | None:  # noqa: ANN401 - any attribute of the model
    """Say how to bring back the contents of a container; others may hold the container itself."""
    if isinstance(value, list | bytearray):
        items = value[:]
        return partial(value.__setitem__, slice(None), items)
    if isinstance(value, dict):
        return _refill(value, value.update, value.copy())
    if isinstance(value, set):
        return _refill(value, value.update, value.copy())
    if isinstance(value, deque):
        return _refill(value, value.extend, value.copy())
    return None


def _refill(container: Any, fill: Callable[[Any], None], kept: Iterable[Any]) -> Restore:  # noqa: ANN401
    def restore() -> None:
        if container != kept:
            container.clear()
            fill(kept)

    return restore


def _keep_hash(attributes: dict[str, Any], name: str, value: Any) -> Restore | None:  # noqa: ANN401
    """Say how to bring back a running hash, which has to be copied each time."""
    if hasattr(value, "hexdigest"):
        kept = value.copy()
        return lambda: attributes.__setitem__(name, kept.copy())
    return None
