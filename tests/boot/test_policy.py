"""Policies: what they accept, and what becomes of an access under each."""

import pytest

from trapline.base.errors import UsageError
from trapline.boot import enforcer as enforcers
from trapline.boot import policy
from trapline.boot.enforcer import Enforcer
from trapline.boot.policy import Guard
from trapline.cpu.engine import Reg
from trapline.tdx.vmm_interface import ExitReason, VeInfo

SHARED = 1 << 39
RIP = 0xFFFFFFFF81000000
MMIO = VeInfo(ExitReason.EPT_VIOLATION, 1, RIP, SHARED | 0xE0000010)
PORT = VeInfo(ExitReason.IO_INSTRUCTION, 0x3F8 << 16, length=1)


class Function:
    devfn = 16
    modalias = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc80i00"


class Devices:
    def function_at(self, space, address):
        return Function() if (space, address) == ("memory", 0xE0000010) else None


class Machine:
    """A machine as far as the enforcer looks at it."""

    def __init__(self):
        self.vcpu = self.memory = self
        self.host = None
        self.module = self
        self.devices = Devices()
        self.shared_bit = SHARED
        self.vectoring = None
        self.regs = dict.fromkeys(Reg, 0)
        self.regs[Reg.RIP] = RIP

    def divert(self, call):
        self.call = call


class Calls:
    def __init__(self, can):
        self.can = can
        self.done = 0

    def carry_out(self, _):
        self.done += self.can
        return self.can


def enforcer(classes, *, known=True, can=True, unlisted=frozenset()):
    heard = []
    made = Enforcer(
        Machine(), classes, lambda *_: object() if known else None, heard.append, unlisted
    )
    made._calls = Calls(can)
    return made, heard


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["mmio"], "'mmio' is not CLASS=MODE"),
        (["hlt=trap"], "'hlt=trap' is not CLASS=MODE"),
        (["mmio=scream"], "'mmio=scream' is not CLASS=MODE"),
        (["mmio=trap", "mmio=forbid"], "names mmio twice"),
    ],
)
def test_a_bad_policy_is_explained(texts, says):
    with pytest.raises(UsageError) as error:
        policy.parse(texts)
    assert says in str(error.value)


def test_policies_are_read():
    assert policy.parse(["mmio=forbid", "pio=paravirt", "pio=paravirt"]) == {
        "mmio": "forbid",
        "pio": "paravirt",
    }


def test_trap_changes_nothing():
    made, heard = enforcer({"pio": "forbid"})
    assert not made.look(MMIO)
    assert heard == []
    assert made.tally.screams == {}


def test_a_known_site_is_paravirtualised():
    made, _ = enforcer({"mmio": "paravirt"})
    assert made.look(MMIO)
    assert made.tally.paravirtualised == {"mmio": 1}
    assert made.tally.missed == {}


@pytest.mark.parametrize(("known", "can"), [(False, True), (True, False)])
def test_an_unknown_site_or_form_is_missed(known, can):
    made, _ = enforcer({"mmio": "paravirt"}, known=known, can=can)
    assert not made.look(MMIO)
    assert made.tally.missed == {"mmio": 1}
    assert made.tally.paravirtualised == {}


def test_forbidden_accesses_are_counted_and_heard_of_once_a_place():
    made, heard = enforcer({"mmio": "forbid"})
    for _ in range(3):
        assert not made.look(MMIO)
    (scream,) = heard
    assert (scream.reason, scream.trap, scream.address, scream.count) == (
        "forbidden",
        "mmio",
        0xE0000010,
        3,
    )
    assert scream.function.devfn == 16
    made._machine.regs[Reg.RIP] += 8
    made.look(MMIO)
    assert len(heard) == 2


def test_a_private_page_is_no_mmio():
    made, heard = enforcer({"mmio": "forbid"})
    assert not made.look(MMIO._replace(gpa=0x1000))
    assert heard == []


def test_a_device_that_is_not_listed_screams_and_the_others_do_not():
    made, heard = enforcer({}, unlisted=frozenset({16}))
    made.look(MMIO)
    made.look(PORT)
    assert [(scream.reason, scream.trap) for scream in heard] == [("not-allowed", "mmio")]
    made, heard = enforcer({}, unlisted=frozenset({24}))
    made.look(MMIO)
    assert heard == []


def test_the_number_of_places_is_bounded(monkeypatch):
    monkeypatch.setattr(enforcers, "MAX_PLACES", 4)
    made, heard = enforcer({"pio": "forbid"})
    for _ in range(10):
        made._machine.regs[Reg.RIP] += 1
        made.look(PORT)
    assert len(heard) == 4
    assert made.tally.screams_dropped == 6


def test_what_needs_a_scan():
    assert not Guard().needs_scan
    assert Guard(classes={"mmio": "trap"}).needs_scan
