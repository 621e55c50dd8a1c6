"""The CPU engine on Unicorn: QEMU's TCG core with its AMD SVM intercepts switched on.

`engine` puts a `memory`, a `vcpu` and `snapshot`s together and opens them; the VCPU is made of
parts that each get what they need: `registerfile`, `linear` addresses, `delivery`, `boundaries`,
`exits`, `emulate` and the like. `libunicorn` holds every private fact about the library, `core`
is the CPU that it opens, `selfcheck` tries both when the first engine starts. `native`,
`interrupthook` and `tlb` assemble what cannot be Python; `nested` keeps the second-level tables.
"""

from trapline.cpu.unicorn.engine import open_engine

__all__ = ["open_engine"]
