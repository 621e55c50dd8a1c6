"""MRTD, the RTMRs and TDREPORT.

The hashes are real: the same image gives the same MRTD, and an RTMR changes as on hardware.
The report is not signed. Its MAC is zero and MRSEAM, the measurement of the module, is a line
of text that says so; no verifier accepts it, and none should.

Sources: TDX module 1.5.01, tdh_mem_page_add.c and tdh_mr_extend.c (blocks hashed into MRTD),
tdg_mr_rtmr_extend.c, tdg_mr_report.c, tdx_api_defs.h (td_report_s).
"""

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from trapline.tdx.vmm_interface import TdConfig

HASH_SIZE: Final = 48  # SHA-384
RTMRS: Final = 4
EXTEND_SIZE: Final = 256  # bytes that one TDH.MR.EXTEND measures
REPORT_SIZE: Final = 1024
REPORT_DATA_SIZE: Final = 64
REPORT_TYPE_TDX: Final = 0x81
TEE_TCB_INFO_SIZE: Final = 239  # what its hash covers; padded to 256
TEE_TCB_VALID: Final = 0x301FF
UNSIGNED: Final = b"trapline software TD: this report is unsigned".ljust(HASH_SIZE, b"\0")


class MeasurementSnapshot(NamedTuple):
    """What `Measurements.save` returns."""

    mrtd: bytes
    rtmrs: tuple[bytes, ...]


class Measurements:
    """The measurement registers of one TD."""

    def __init__(self, config: "TdConfig") -> None:
        self._config = config
        self._build = hashlib.sha384()
        self.mrtd = bytes(HASH_SIZE)
        self.rtmrs = [bytes(HASH_SIZE)] * RTMRS

    # What the VMM does while it builds the TD.

    def page_added(self, gpa: int) -> None:
        """TDH.MEM.PAGE.ADD of the page at `gpa`."""
        self._build.update(_block(b"MEM.PAGE.ADD", gpa))

    def extend(self, gpa: int, chunk: bytes) -> None:
        """TDH.MR.EXTEND of 256 bytes at `gpa`."""
        if len(chunk) != EXTEND_SIZE or gpa % EXTEND_SIZE:
            raise ValueError("TDH.MR.EXTEND measures 256 aligned bytes")
        self._build.update(_block(b"MR.EXTEND", gpa))
        self._build.update(chunk)

    def finalize(self) -> None:
        """TDH.MR.FINALIZE: MRTD is fixed from here on."""
        self.mrtd = self._build.digest()

    # What the guest does.

    def extend_rtmr(self, index: int, value: bytes) -> None:
        """TDG.MR.RTMR.EXTEND."""
        self.rtmrs[index] = hashlib.sha384(self.rtmrs[index] + value).digest()

    def td_info(self) -> bytes:
        """TDINFO_STRUCT, 512 bytes."""
        config = self._config
        fields = struct.pack("<QQ", config.attributes, config.xfam)
        for measurement in (
            self.mrtd,
            config.mr_config_id,
            config.mr_owner,
            config.mr_owner_config,
            *self.rtmrs,
        ):
            fields += measurement[:HASH_SIZE].ljust(HASH_SIZE, b"\0")
        return fields.ljust(512, b"\0")  # SERVTD_HASH is zero: no service TDs

    def report(self, data: bytes) -> bytes:
        """TDREPORT_STRUCT, 1024 bytes, for 64 bytes of REPORTDATA; unsigned."""
        td_info = self.td_info()
        tcb_info = struct.pack("<Q", TEE_TCB_VALID) + bytes(16) + UNSIGNED
        tcb_info = tcb_info.ljust(256, b"\0")
        mac = struct.pack("<BBBB", REPORT_TYPE_TDX, 0, 0, 0)
        mac = mac.ljust(32, b"\0")  # CPUSVN is zero
        mac += hashlib.sha384(tcb_info[:TEE_TCB_INFO_SIZE]).digest()
        mac += hashlib.sha384(td_info).digest()
        mac += data[:REPORT_DATA_SIZE].ljust(REPORT_DATA_SIZE, b"\0")
        return mac.ljust(256, b"\0") + tcb_info + td_info

    # Snapshots.

    def save(self) -> MeasurementSnapshot:
        """Return MRTD and the RTMRs."""
        return MeasurementSnapshot(self.mrtd, tuple(self.rtmrs))

    def restore(self, snapshot: MeasurementSnapshot) -> None:
        """Go back to a saved state."""
        self.mrtd = snapshot.mrtd
        self.rtmrs = list(snapshot.rtmrs)


def _block(name: bytes, gpa: int) -> bytes:
    """Lay out the 128 bytes that stand for one call in MRTD."""
    return (name.ljust(16, b"\0") + struct.pack("<Q", gpa)).ljust(128, b"\0")
