"""The engine refuses a library whose layout is not the one it knows."""

import pytest

from bare_guest import BareGuest
from trapline.base.errors import EngineMismatchError, ExitCode
from trapline.cpu.unicorn import core, libunicorn, selfcheck
from trapline.cpu.unicorn.engine import UnicornEngine, checked_library, open_engine
from trapline.cpu.unicorn.libunicorn import (
    Cpu,
    CpuClass,
    Env,
    HFlags,
    HFlags2,
    Library,
    Svm,
    Uc,
)


def create(ram_size):
    return UnicornEngine(Library(), ram_size)


def fields(holder):
    return [name for name in vars(holder) if name.isupper()]


# Not verified by a value at the offset: only a guest shows them.
BY_GUEST = {
    (Env, "HFLAGS"),
    (Env, "HFLAGS2"),
    (Env, "SEGS"),
    (Env, "ERROR_CODE"),
    (Env, "EXCEPTION_IS_INT"),
    (Env, "EXCEPTION_NEXT_EIP"),
    (Env, "HW_BREAKPOINTS"),
    (Env, "VM_VMCB"),
    (Env, "INTERCEPT"),
    (Env, "INTERCEPT_CR_WRITE"),
    (Env, "INTERCEPT_EXCEPTIONS"),
    (Env, "NESTED_CR3"),
    (Env, "NESTED_PG_MODE"),
    (Env, "RESET_END"),
}
BY_VALUE = [
    (holder, name)
    for holder in (Uc, Cpu, CpuClass, Env)
    for name in fields(holder)
    if (holder, name) not in BY_GUEST
]


def test_the_installed_library_is_the_known_one():
    selfcheck.check_fields(Library())
    selfcheck.check_behaviour(create)


@pytest.mark.parametrize(("holder", "name"), BY_VALUE)
@pytest.mark.parametrize("shift", [8, -8])
def test_a_wrong_offset_is_refused(monkeypatch, holder, name, shift):
    monkeypatch.setattr(holder, name, getattr(holder, name) + shift)
    with pytest.raises(EngineMismatchError, match=r"^the installed unicorn is not the build"):
        selfcheck.check_fields(Library())


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (Env, "INTERCEPT", Env.INTERCEPT + 8),
        (Env, "INTERCEPT_EXCEPTIONS", Env.INTERCEPT_EXCEPTIONS + 4),
        (Env, "INTERCEPT_CR_WRITE", Env.INTERCEPT_CR_WRITE + 2),
        (HFlags, "GUEST", 1 << 27),
        (HFlags2, "NPT", 1 << 12),
    ],
)
def test_a_guest_that_behaves_differently_is_refused(monkeypatch, holder, name, value):
    monkeypatch.setattr(holder, name, value)
    with pytest.raises(EngineMismatchError, match=r"a probe saw|the CPU core stopped"):
        selfcheck.check_behaviour(create)


@pytest.mark.parametrize("code", [Svm.CPUID, Svm.MSR, Svm.HLT, Svm.VINTR])
def test_an_intercept_that_does_nothing_is_noticed(monkeypatch, code):
    monkeypatch.setattr(core, "_INTERCEPTS", core._INTERCEPTS & ~(1 << code - Svm.INTR))
    with pytest.raises(EngineMismatchError, match=r"a probe saw|the CPU core stopped"):
        selfcheck.check_behaviour(create)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(libunicorn, "KNOWN_VERSION", "2.1.5")
    with pytest.raises(EngineMismatchError, match=r"needs unicorn 2\.1\.5 and 2\.1\.4 is"):
        Library()


def test_a_missing_function_is_refused(monkeypatch):
    monkeypatch.setitem(libunicorn._SYMBOLS, "no_such_function_x86_64", ([], None))
    with pytest.raises(EngineMismatchError, match="does not export no_such_function_x86_64"):
        Library()


def test_the_first_engine_of_a_process_looks(monkeypatch):
    checked_library.cache_clear()
    with monkeypatch.context() as broken:
        broken.setattr(Env, "LSTAR", Env.LSTAR + 8)
        with pytest.raises(EngineMismatchError) as refusal:
            open_engine(1 << 20)
        assert refusal.value.exit_code is ExitCode.ENGINE_MISMATCH
        assert "\n" not in str(refusal.value)
    with BareGuest("hlt") as guest:
        guest.run()
    assert checked_library.cache_info().currsize == 1
