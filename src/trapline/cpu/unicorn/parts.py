"""What the parts of a VCPU offer each other: a part has `decoders`, a state, or both."""

from collections.abc import Callable
from typing import Any, Protocol

from trapline.cpu.engine import Exit

# What the handler is told of an exit, or None when the part has done what there was to do.
Decoder = Callable[[], Exit | None]
Decoders = dict[int, Decoder]  # by the core's code of the exit (`libunicorn.Svm`)


class Stateful(Protocol):
    """A part that remembers something of the guest which no register and no slot holds."""

    def save(self) -> Any:  # noqa: ANN401 - each part's own
        """Return it."""

    def load(self, saved: Any, /) -> None:  # noqa: ANN401 - what `save` returned
        """Return to a saved state."""
