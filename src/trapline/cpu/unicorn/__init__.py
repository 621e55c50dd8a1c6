"""The CPU engine on Unicorn: QEMU's TCG core with its AMD SVM intercepts switched on.

`engine` implements `trapline.cpu.engine.Engine`; `layout` holds every private fact about the
library and checks each when it starts; `native` assembles the hooks that cannot be Python;
`nested` keeps the second-level page tables; `state` reads and writes the CPU state;
`snapshot` freezes and restores; `decode` reads the instruction behind an exit.
"""

from trapline.cpu.unicorn.vcpu import UnicornEngine

open_engine = UnicornEngine

__all__ = ["UnicornEngine", "open_engine"]
