"""The remote stub over a real socket, with an engine that only counts instructions."""

import threading

import pytest
from gdb_client import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from trapline.base.errors import UsageError
from trapline.cpu.engine import Exit, Reg, SegmentRegister
from trapline.machine.gdb.codec import MAX_PACKET, encode
from trapline.machine.gdb.commands import MAX_BREAKPOINTS, Interpreter, Resume
from trapline.machine.gdb.monitor import Monitor
from trapline.machine.gdb.server import GdbServer, parse_address
from trapline.machine.gdb.targetregisters import REGISTERS
from trapline.tdx.vmm_interface import ExitReason, VeInfo

CODE = 0x1000
DATA = 0x5000
LAST = 0x2100  # the counting guest ends here


class CountingVcpu:
    """Every instruction is one byte long and does nothing; some addresses exit."""

    def __init__(self):
        self.regs = [0] * 17
        self.regs[Reg.RIP] = CODE
        self.rflags = 0x202
        self.memory = {DATA: bytearray(range(256)) * 16, DATA + 0x1000: bytearray(4096)}
        self.exits = {}
        self.breakpoints = frozenset()
        self.control = {0: 0x80050033, 2: 0, 3: 0x1000, 4: 0x20}
        self.msrs = {}
        self._stopped = self._boundary = False

    def segment(self, name):
        return SegmentRegister({"cs": 0x10, "ss": 0x18}.get(name, 0), 0, 0xFFFFFFFF, 0)

    def msr(self, index):
        return self.msrs.get(index, 0)

    def set_msr(self, index, value):
        self.msrs[index] = value

    def cr(self, number):
        return self.control[number]

    def set_cr(self, number, value):
        self.control[number] = value

    def read(self, gla, size):
        page = self.memory.get(gla & ~0xFFF)
        return None if page is None else bytes(page[gla & 0xFFF : (gla & 0xFFF) + size])

    def write(self, gla, data):
        page = self.memory.get(gla & ~0xFFF)
        if page is None:
            return False
        page[gla & 0xFFF : (gla & 0xFFF) + len(data)] = data
        return True

    def set_breakpoints(self, addresses):
        self.breakpoints = addresses

    def request_boundary(self):
        self._boundary = True

    def stop(self):
        self._stopped = True

    def run(self, handler):
        self._stopped = False
        while not self._stopped:
            self._one(handler)

    def step(self, handler):
        self._one(handler)

    def _one(self, handler):
        rip = self.regs[Reg.RIP]
        if self._boundary:
            self._boundary = False
            handler(Exit.BOUNDARY)
        elif rip in self.breakpoints:
            handler(Exit.BREAKPOINT)
        elif rip >= LAST:
            handler(Exit.HLT)
        elif rip in self.exits:
            handler(self.exits[rip])
        else:
            self.regs[Reg.RIP] += 1


class Target:
    def backtrace(self):
        return ["#0 exc_page_fault+0x1/0x2"]

    def recent_traps(self, count):
        return [f"trap {index}" for index in range(count)]

    def placement(self):
        return ["slide 0x1000000"]

    def text_segment(self):
        return self.segment

    segment = None


def test_gdb_is_told_where_kaslr_put_the_kernel_once_that_is_known():
    target = Target()
    interpreter = Interpreter(CountingVcpu(), Monitor(target))
    assert interpreter.handle(b"qOffsets") == b""
    target.segment = 0xFFFFFFFFB2600000
    assert interpreter.handle(b"qOffsets") == b"TextSeg=ffffffffb2600000"


class Session:
    """A server that runs the counting engine in a thread until it reaches LAST."""

    def __init__(self):
        self.vcpu = CountingVcpu()
        self.said = []
        self.ended = False
        self.clean = True
        self.server = GdbServer("127.0.0.1:0", self.vcpu, Target(), self.said.append)
        self.extra = {}
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _handler(self, reason):
        rip = self.vcpu.regs[Reg.RIP]
        if reason is Exit.HLT or self.ended:
            self.ended = True
            self.vcpu.stop()
        elif reason is Exit.CPUID:
            self.vcpu.regs[Reg.RIP] = 0x2000
            self.server.on_ve(rip, VeInfo(ExitReason.CPUID), double_fault=False)
        elif reason is not Exit.BOUNDARY:
            self.vcpu.regs[Reg.RIP] = self.extra.get(rip, rip + 4)

    def _run(self):
        self.server.run(self._handler, lambda: self.ended)
        self.server.finish(clean=self.clean, text="triple fault")

    def __enter__(self):
        self.thread.start()
        self.client = Client(self.server.address)
        return self

    def __exit__(self, *exception):
        self.ended = True
        self.client.socket.close()
        self.vcpu.stop()
        self.thread.join(20)
        self.server.close()
        assert not self.thread.is_alive()


@pytest.fixture
def session():
    with Session() as running:
        yield running


def test_the_guest_waits_for_gdb_before_its_first_instruction(session):
    assert session.client.ask(b"?") == b"T05thread:01;"
    assert session.vcpu.regs[Reg.RIP] == CODE
    assert session.said[0].startswith("waiting for gdb: target remote 127.0.0.1:")


def test_power_off_is_an_exit_with_status_0(session):
    assert session.client.ask(b"c") == b"W00"
    assert session.client.receive() is None


def test_a_breakpoint_stops_once_and_is_stepped_over(session):
    client = session.client
    assert client.ask(b"Z0,1010,1") == b"OK"
    assert client.ask(b"Z1,1020,1") == b"OK"
    assert client.ask(b"c") == b"T05thread:01;swbreak:;"
    assert session.vcpu.regs[Reg.RIP] == 0x1010
    assert client.ask(b"?") == b"T05thread:01;swbreak:;"
    assert client.ask(b"vCont;c") == b"T05thread:01;hwbreak:;"
    assert session.vcpu.regs[Reg.RIP] == 0x1020
    assert client.ask(b"z1,1020,1") == b"OK"
    assert client.ask(b"c") == b"W00"


def test_a_step_is_one_instruction_even_on_a_breakpoint(session):
    client = session.client
    assert client.ask(b"Z0,1000,1") == b"OK"
    assert client.ask(b"s") == b"T05thread:01;"
    assert session.vcpu.regs[Reg.RIP] == 0x1001
    assert client.ask(b"vCont;s:1;c") == b"T05thread:01;"
    assert session.vcpu.regs[Reg.RIP] == 0x1002


def test_ctrl_c_stops_a_running_guest(session):
    session.vcpu.exits[0x1010] = Exit.RDPMC
    session.extra[0x1010] = 0x1010  # an endless loop of exits
    session.client.send(b"c")
    session.client.socket.sendall(b"\x03")
    assert session.client.receive() == b"T02thread:01;"
    assert session.client.ask(b"?") == b"T02thread:01;"


def test_stop_on_ve_stops_at_the_handlers_first_instruction(session):
    session.vcpu.exits[0x1010] = Exit.CPUID
    assert session.client.ask(b"qRcmd," + b"stop-on ve".hex().encode())
    assert session.client.ask(b"c") == b"T05thread:01;"
    assert session.vcpu.regs[Reg.RIP] == 0x2000


def test_stop_on_tdcall_stops_before_it_and_then_passes_it(session):
    session.vcpu.exits[0x1010] = Exit.TDCALL
    session.vcpu.exits[0x1020] = Exit.TDCALL
    session.client.ask(b"qRcmd," + b"stop-on tdcall".hex().encode())
    stops = []
    for _ in range(2):
        assert session.client.ask(b"c") == b"T05thread:01;"
        stops.append(session.vcpu.regs[Reg.RIP])
    assert stops == [0x1010, 0x1020]
    session.client.ask(b"qRcmd," + b"stop-on none".hex().encode())
    assert session.client.ask(b"c") == b"W00"


def test_a_detached_guest_runs_on_without_breakpoints(session):
    session.client.ask(b"Z0,1010,1")
    assert session.client.ask(b"D") == b"OK"
    session.thread.join(20)
    assert session.ended
    assert session.vcpu.breakpoints == frozenset()


def test_a_client_that_hangs_up_detaches(session):
    session.client.ask(b"Z0,1010,1")
    session.client.socket.close()
    session.thread.join(20)
    assert session.ended


@pytest.mark.parametrize("packet", [b"k", b"vKill;1"])
def test_kill_ends_the_run(session, packet):
    session.clean = False
    session.client.send(packet)
    session.thread.join(20)
    assert session.server.was_killed
    assert session.vcpu.regs[Reg.RIP] == CODE
    assert "runs on" not in session.said[-1]


def test_a_guest_that_is_gone_does_not_run_on(session):
    session.clean = False
    client = session.client
    client.ask(b"c")
    client.socket.close()
    session.thread.join(20)
    assert session.said[-1] == "gdb detached"


def test_a_crashed_guest_can_be_looked_at(session):
    session.clean = False
    client = session.client
    assert client.ask(b"c") == b"O" + b"trapline: triple fault\n".hex().encode()
    assert client.receive() == b"T06thread:01;"
    assert client.ask(b"m5001,2") == b"0102"
    assert client.ask(b"c") == b"X06"


def test_no_ack_mode(session):
    client = session.client
    assert client.ask(b"QStartNoAckMode") == b"OK"
    client.events.clear()
    client.socket.sendall(encode(b"qC"))
    assert client.socket.recv(100) == encode(b"QC01")


def test_a_damaged_packet_is_asked_for_again_and_a_reply_repeated(session):
    client = session.client
    client.socket.sendall(b"$qC#00")
    assert client.socket.recv(100) == b"-"
    assert client.ask(b"qC") == b"QC01"
    client.socket.sendall(b"-")
    assert client.receive() == b"QC01"


def test_a_flood_while_the_guest_runs_ends_the_session(session):
    session.vcpu.exits[0x1010] = Exit.RDPMC
    session.extra[0x1010] = 0x1010
    session.client.send(b"c")
    with pytest.raises(ConnectionError):
        session.client.socket.sendall(encode(b"qC") * 5_000_000)
    assert session.said[-1] == "gdb detached; the guest runs on"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":1234", ("127.0.0.1", 1234)),
        ("1234", ("127.0.0.1", 1234)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("localhost:9000", ("localhost", 9000)),
        ("[::1]:1234", ("::1", 1234)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "1.2.3.4:", ":65536", "a b:1", "::1:5"])
def test_bad_addresses_are_refused(text):
    with pytest.raises(UsageError):
        parse_address(text)


def test_a_taken_port_is_one_sentence():
    with (
        GdbServer(":0", CountingVcpu(), Target(), print) as first,
        pytest.raises(UsageError, match="cannot listen for gdb"),
    ):
        GdbServer(f":{first.address[1]}", CountingVcpu(), Target(), print)


# The interpreter, without a socket.


@pytest.fixture
def interpreter():
    return Interpreter(CountingVcpu(), Monitor(Target()))


def test_registers_are_in_the_described_order(interpreter):
    whole = interpreter.handle(b"g").decode()
    assert len(whole) == sum(register.digits for register in REGISTERS)
    assert whole[16 * 16 : 17 * 16] == "0010000000000000"  # RIP
    names = [register.name for register in REGISTERS]
    xml = interpreter._xml.decode()
    assert [name for name in names if f'name="{name}"' in xml] == names
    assert interpreter.handle(b"p%x" % names.index("st0")) == b"x" * 20
    assert interpreter.handle(b"p%x" % names.index("cr3")) == b"0010000000000000"


def test_registers_are_written(interpreter):
    vcpu = interpreter._vcpu
    assert interpreter.handle(b"P0=0102030405060708") == b"OK"
    assert vcpu.regs[Reg.RAX] == 0x0807060504030201
    cs = [register.name for register in REGISTERS].index("cs")
    assert interpreter.handle(b"P%x=10000000" % cs) == b"E01"
    assert interpreter.handle(b"P0=01") == b"E01"
    whole = interpreter.handle(b"g")
    changed = b"ff" * 8 + whole[16:]
    assert interpreter.handle(b"G" + changed) == b"OK"
    assert vcpu.regs[Reg.RAX] == 2**64 - 1
    assert interpreter.handle(b"G00") == b"E16"


def test_memory_is_read_up_to_the_first_absent_page(interpreter):
    assert interpreter.handle(b"m5000,4") == b"00010203"
    assert interpreter.handle(b"m5ffe,4") == b"feff0000"
    assert interpreter.handle(b"m6ffe,4") == b"0000"
    assert interpreter.handle(b"m9000,4") == b"E0e"
    assert interpreter.handle(b"mffffffffffffffff,4") == b"E0e"
    assert len(interpreter.handle(b"m5000,ffffffff")) <= MAX_PACKET


def test_memory_is_written(interpreter):
    assert interpreter.handle(b"M5ffe,4:01020304") == b"OK"
    assert interpreter.handle(b"m5ffe,4") == b"01020304"
    assert interpreter.handle(b"X5000,2:\xfe\x00") == b"OK"
    assert interpreter.handle(b"m5000,2") == b"fe00"
    assert interpreter.handle(b"M9000,1:00") == b"E0e"
    assert interpreter.handle(b"M5000,2:00") == b"E16"


def test_breakpoints_are_bounded_and_watchpoints_unknown(interpreter):
    assert interpreter.handle(b"Z2,1000,8") == b""
    for index in range(MAX_BREAKPOINTS):
        assert interpreter.handle(b"Z0,%x,1" % index) == b"OK"
    assert interpreter.handle(b"Z0,ffffff,1") == b"E1c"
    interpreter.clear_breakpoints()
    assert interpreter._vcpu.breakpoints == frozenset()


@pytest.mark.parametrize(
    ("packet", "reply"),
    [
        (b"", b""),
        (b"!", b""),
        (b"vMustReplyEmpty", b""),
        (b"vCont?", b"vCont;c;C;s;S"),
        (b"vCont;q", b"E16"),
        (b"vCont;s", Resume.STEP),
        (b"qAttached", b"1"),
        (b"qfThreadInfo", b"m01"),
        (b"qsThreadInfo", b"l"),
        (b"Hg0", b"OK"),
        (b"m", b"E16"),
        (b"m-1,4", b"E16"),
        (b"m5000", b"E16"),
        (b"p", b"E16"),
        (b"p999", b"E01"),
        (b"P", b"E16"),
        (b"P0=zz", b"E16"),
        (b"Z0", b"E16"),
        (b"c_5", b"E16"),
        (b"qRcmd,7", b"E16"),
        (b"qXfer:features:read:target.xml:x,y", b"E16"),
        (b"qXfer:features:read:target.xml:ffffff,10", b"l"),
    ],
)
def test_packets(interpreter, packet, reply):
    assert interpreter.handle(packet) == reply


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("bt", "#0 exc_page_fault+0x1/0x2\n"),
        ("kaslr", "slide 0x1000000\n"),
        ("traps 2", "trap 0\ntrap 1\n"),
        ("traps x", "traps takes a number\n"),
        ("stop-on mc", "stop-on takes one of: ve, tdcall, both, none\n"),
        ("stop-on both", "stopping on: both\n"),
        ("frob", "unknown command 'frob'; try `monitor help`\n"),
    ],
)
def test_monitor(interpreter, line, answer):
    reply = interpreter.handle(b"qRcmd," + line.encode().hex().encode())
    assert bytes.fromhex(reply.decode()).decode() == answer


def test_monitor_help_names_every_command(interpreter):
    text = interpreter._monitor.run("help")
    assert all(
        f"monitor {name}" in text for name in interpreter._monitor._commands if name != "help"
    )


packets = st.one_of(
    st.binary(max_size=80),
    st.tuples(
        st.sampled_from(
            [b"m", b"M", b"X", b"Z0,", b"z0,", b"p", b"P", b"G", b"q", b"v", b"qRcmd,"]
        ),
        st.text("0123456789abcdefABCDEF,:;=-_ \n", max_size=40).map(str.encode),
    ).map(b"".join),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(packets, max_size=20))
def test_no_packet_raises(batch):
    interpreter = Interpreter(CountingVcpu(), Monitor(Target()))
    for packet in batch:
        reply = interpreter.handle(packet)
        assert isinstance(reply, (bytes, Resume))
        assert isinstance(reply, Resume) or len(reply) <= MAX_PACKET
