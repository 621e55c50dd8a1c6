"""Metadata fields: TDG.VM.RD, TDG.VM.WR, TDG.VP.RD, TDG.VP.WR and TDG.SYS.RD.

The table `fields` says which fields exist and which bits of them the guest may read and
write. A field is found by its class and code; size, context and increment bits of the
identifier that the guest passes are ignored.

Sources: TDX module 1.5.01, tdg_vm_rd_wr.c, tdg_vp_rd_wr.c, tdg_sys_rd.c, metadata_generic.c,
metadata_td.c, metadata_vp.c.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.rules.rows import FieldRule, FieldScope

if TYPE_CHECKING:
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.controls import Controls
    from trapline.tdx.cpuid import Cpuid
    from trapline.tdx.measurement import Measurements
    from trapline.tdx.vmm_interface import TdConfig

NO_FIELD: Final = (1 << 64) - 1
CONTEXT_MASK: Final = 7 << 52
INC_SIZE: Final = 1 << 50
CODE_MASK: Final = 0xFF_FFFF
CLASS_SHIFT, CLASS_MASK = 56, 0x3F
# RESERVED_0 31:24, LAST_ELEMENT 37:34, LAST_FIELD 46:38, RESERVED_1 49:47, 55 and 62.
MUST_BE_ZERO: Final = 0xFF << 24 | 0xF << 34 | 0x1FF << 38 | 7 << 47 | 1 << 55 | 1 << 62
CPUID_VE_VALID: Final = 0xFF
# TDX_FEATURES0: VP.RD/WR, CPUID control, TD-entry enhancements, pending violation v2, NO_RBP_MOD.
TDX_FEATURES: Final = 1 << 3 | 1 << 5 | 1 << 9 | 1 << 16 | 1 << 18
OK: Final = "ok"  # the case of success
VENDOR_INTEL: Final = 0x8086
TSC_UNIT: Final = 25_000_000


class Element(NamedTuple):
    """One element of a field: `number` counts from the field's first."""

    row: FieldRule
    number: int


class Metadata:
    """The fields of one TD and its one VCPU."""

    def __init__(
        self,
        rules: "RuleSet",
        config: "TdConfig",
        controls: "Controls",
        cpuid: "Cpuid",
        measurements: "Measurements",
    ) -> None:
        self._config = config
        self._controls = controls
        self._cpuid = cpuid
        self._measurements = measurements
        self._rows: dict[FieldScope, list[FieldRule]] = {scope: [] for scope in FieldScope}
        for row in rules.each(FieldRule):
            self._rows[row.scope].append(row)
        for rows in self._rows.values():
            rows.sort(key=_place)
        version = rules.version.split(".")
        self._major, self._minor = int(version[0]), int(version[1])

    def read(self, scope: FieldScope, field_id: int) -> tuple[str, int]:
        """Return the case of the table `tdcalls` and the value, which is 0 on failure."""
        element = self._find(scope, field_id)
        if element is None:
            return "bad_field_id", 0
        if not element.row.read_mask:
            return "not_readable", 0
        return OK, self._value(element) & element.row.read_mask

    def write(self, scope: FieldScope, field_id: int, value: int, mask: int) -> tuple[str, int]:
        """Return the case of the table `tdcalls` and the old value, which is 0 on failure."""
        element = self._find(scope, field_id)
        if element is None:
            return "bad_field_id", 0
        writable = element.row.write_mask
        if not mask & writable:
            return "not_writable", 0
        old = self._value(element)
        if (old ^ value) & mask & ~writable:
            return "forbidden_bits_change", 0
        new = old & ~(mask & writable) | value & mask & writable
        if not self._set(element, new):
            return "value_not_taken", 0
        return OK, old & element.row.read_mask

    def next_readable(self, scope: FieldScope, field_id: int) -> int:
        """Return the identifier of the readable element behind `field_id`, or NO_FIELD.

        NO_FIELD as `field_id` asks for the first one.
        """
        rows = self._rows[scope]
        found = None if self.is_null(field_id) else self._find(scope, field_id)
        start = 0
        if found is not None:
            if found.number + 1 < found.row.elements and found.row.read_mask:
                return _identifier(found.row, found.number + 1)
            start = rows.index(found.row) + 1
        return next((row.code for row in rows[start:] if row.read_mask), NO_FIELD)

    @staticmethod
    def is_null(field_id: int) -> bool:
        """Whether the identifier asks for the first field: all ones, the context aside."""
        return field_id | CONTEXT_MASK == NO_FIELD

    def _find(self, scope: FieldScope, field_id: int) -> Element | None:
        if field_id & MUST_BE_ZERO:
            return None
        field_class = field_id >> CLASS_SHIFT & CLASS_MASK
        code = field_id & CODE_MASK
        for row in self._rows[scope]:
            first = row.code & CODE_MASK
            stride = 2 if row.code & INC_SIZE else 1
            if (
                row.code >> CLASS_SHIFT & CLASS_MASK == field_class
                and first <= code < first + row.elements * stride
            ):
                return Element(row, (code - first) // stride)
        return None

    def _value(self, element: Element) -> int:
        config, name, number = self._config, element.row.name, element.number
        if name == "CPUID_CONTROL":
            return self._cpuid.control.get(number, 0)
        hashes = {
            "MRTD": self._measurements.mrtd,
            "MRCONFIGID": config.mr_config_id,
            "MROWNER": config.mr_owner,
            "MROWNERCONFIG": config.mr_owner_config,
            "RTMR": b"".join(self._measurements.rtmrs),
        }
        if name in hashes:
            return int.from_bytes(hashes[name][8 * number : 8 * number + 8], "little")
        # What is not named is 0 for this TD: no L2 VMs, no service TDs, VCPU 0, a UUID of zeros.
        return {
            "ATTRIBUTES": config.attributes,
            "XFAM": config.xfam,
            "NUM_VCPUS": 1,
            "MAX_VCPUS": config.max_vcpus,
            "GPAW": self._controls.config_flags & 1,
            "TSC_FREQUENCY": config.tsc_frequency // TSC_UNIT,
            "CONFIG_FLAGS": self._controls.config_flags,
            "TD_CTLS": self._controls.td_ctls,
            "FEATURE_PARAVIRT_CTLS": self._controls.feature_paravirt_ctls,
            "TOPOLOGY_ENUM_CONFIGURED": int(self._controls.topology_configured),
            "VE_REDUCTION_VALID": 1,
            "NOTIFY_ENABLES": self._controls.notify_enables,
            "CPUID_SUPERVISOR_VE": int(self._cpuid.supervisor_ve),
            "CPUID_USER_VE": int(self._cpuid.user_ve),
            "VENDOR_ID": VENDOR_INTEL,
            "MAJOR_VERSION": self._major,
            "MINOR_VERSION": self._minor,
            "NUM_TDX_FEATURES": 1,
            "TDX_FEATURES0": TDX_FEATURES,
        }.get(name, 0)

    def _set(self, element: Element, new: int) -> bool:
        """Store a new value; False when the field does not take it."""
        name = element.row.name
        if name == "TD_CTLS":
            return self._controls.write_td_ctls(new)
        if name == "FEATURE_PARAVIRT_CTLS":
            return self._controls.write_feature_paravirt_ctls(new)
        if name == "NOTIFY_ENABLES":
            self._controls.notify_enables = new
        elif name == "CPUID_SUPERVISOR_VE":
            self._cpuid.supervisor_ve = bool(new & CPUID_VE_VALID)
        elif name == "CPUID_USER_VE":
            self._cpuid.user_ve = bool(new & CPUID_VE_VALID)
        elif name == "CPUID_CONTROL":
            self._cpuid.control[element.number] = new
        else:
            return False  # a table of another version lets the guest write what is not kept
        return True


def _place(row: FieldRule) -> tuple[int, int]:
    """Return class and code, by which the module keeps fields of a scope in order."""
    return row.code >> CLASS_SHIFT & CLASS_MASK, row.code & CODE_MASK


def _identifier(row: FieldRule, number: int) -> int:
    stride = 2 if row.code & INC_SIZE else 1
    return row.code + number * stride
