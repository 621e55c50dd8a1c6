"""How Linux makes calls: thunks, static calls, what is patched away.

Sources: arch/x86/lib/retpoline.S (indirect thunks; `its` ones since v6.15 and stable),
include/linux/static_call.h and static_call_types.h, arch/x86/include/asm/linkage.h (return
thunks), arch/x86/kernel/ftrace_64.S, arch/x86/kernel/callthunks.c.
"""

from typing import Final

from iced_x86 import Register

from trapline.kernel.calls.conventions import CallNames

_REGISTERS: Final = {
    name.lower(): getattr(Register, name)
    for name in (
        *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
        *(f"R{number}" for number in range(8, 16)),
    )
}
_THUNKS: Final = (
    "__x86_indirect_thunk_",
    "__x86_indirect_call_thunk_",
    "__x86_indirect_jump_thunk_",
    "__x86_indirect_its_thunk_",
    "__x86_indirect_paranoid_thunk_",
)

CALL_NAMES: Final = CallNames(
    thunks={
        f"{prefix}{name}": register for prefix in _THUNKS for name, register in _REGISTERS.items()
    },
    returns=(
        "__x86_return_thunk",
        "its_return_thunk",
        "srso_return_thunk",
        "retbleed_return_thunk",
    ),
    untraced=("__fentry__", "__x86_return_skl"),
    static_calls=("__start_static_call_sites", "__stop_static_call_sites"),
    static_update="__static_call_update",
    paravirt="pv_ops",
    per_cpu="__per_cpu_start",
)
