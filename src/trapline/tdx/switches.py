"""What is switched on for a TD: by its VMM at TDH.MNG.INIT, and by itself.

Rows of the tables `msrs` and `cpuid` name the features that decide them.

Source: TDX module 1.5.01, virt_msr_helpers.h; bits by the table `attributes`.
"""

from typing import TYPE_CHECKING, Final

from trapline.rules.rows import Feature

if TYPE_CHECKING:
    from trapline.rules.ruleset import RuleSet
    from trapline.tdx.vmm_interface import TdConfig

# Feature -> the register that holds its bits, and their names.
_BITS: Final = (
    (Feature.PERFMON, "attribute", ("PERFMON",)),
    (Feature.PKS, "attribute", ("PKS",)),
    (Feature.PT, "xfam", ("PT",)),
    (Feature.CET, "xfam", ("CET_U", "CET_S")),
    (Feature.UINTR, "xfam", ("UINTR",)),
    (Feature.LBR, "xfam", ("LBR",)),
    (Feature.XFD, "xfam", ("AMX_TILECFG", "AMX_TILEDATA")),
)


def features_of(rules: "RuleSet", config: "TdConfig") -> frozenset[Feature]:
    """Name the features that the VMM has given to the TD."""
    on = set(config.features)
    held = {"attribute": config.attributes, "xfam": config.xfam}
    on.update(feature for feature, kind, names in _BITS if held[kind] & rules.mask(kind, *names))
    if {Feature.PERFMON, Feature.PT} <= on:
        on.add(Feature.PERFMON_AND_PT)
    return frozenset(on)
