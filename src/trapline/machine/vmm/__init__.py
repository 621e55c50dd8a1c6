"""The VMM of the software TD: the untrusted host's side of the GHCI.

- `ghci`      numbers: TDVMCALL leaves, statuses, registers
- `services`  what each TDVMCALL leaf does
- `msrs`      MSRs that the host answers for
- `fatal`     what a guest says in its last words
- `host`      TD exits, interrupts and virtual time

Everything a guest passes in is hostile: each argument is checked before it is used, and no
argument decides how long a call takes or how much memory it needs.

Source: Intel TDX Guest-Hypervisor Communication Interface (GHCI) 1.5, chapter 3; where it
leaves a choice, KVM's (Linux, arch/x86/kvm/vmx/tdx.c).
"""
