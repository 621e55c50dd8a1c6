"""Builds the call graph of a kernel from its code, its data and its types."""

from typing import TYPE_CHECKING

import numpy as np

from trapline.isa.branches import Flow
from trapline.kernel.calls.codemap import CodeMap
from trapline.kernel.calls.graph import EdgeKind, Graph, Site
from trapline.kernel.calls.kcfi import Kcfi
from trapline.kernel.calls.optables import Member, Tables
from trapline.kernel.calls.pointers import Pointers, regions_of, variables_of
from trapline.kernel.calls.resolve import Resolver
from trapline.kernel.calls.staticcalls import static_sites, static_targets
from trapline.kernel.calls.survey import Survey
from trapline.kernel.types.btf import Btf
from trapline.kernel.types.layout import Layouts

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from trapline.kernel.binary import Binary
    from trapline.kernel.calls.conventions import CallNames


def build_graph(binary: "Binary", names: "CallNames") -> Graph:
    """Build the graph of a vmlinux. Raises BadImageError where its types are not sound."""
    return _Builder(binary, names).graph()


class _Builder:
    def __init__(self, binary: "Binary", names: "CallNames") -> None:
        self._binary = binary
        self._names = names
        self.code = code = CodeMap(binary, names)
        self._layouts = layouts = _layouts(binary)
        prototypes: dict[int, int] = {}
        if layouts is not None:
            functions = layouts.functions
            found = binary.addresses_of(functions)
            prototypes = {address: functions[name] for address, name in found.items()}
        classes = {
            address: layouts.class_of(prototype)
            for address, prototype in prototypes.items()
            if layouts is not None
        }
        pointers = Pointers(regions_of(binary), variables_of(binary), code.starts)
        tables = None if layouts is None else Tables(pointers, layouts, classes)
        per_cpu = binary.address_of(names.per_cpu) or 0
        self.survey = Survey(code, layouts, prototypes, pointers, tables, per_cpu)
        self.resolver = Resolver(
            *(code, self.survey, pointers, tables, layouts, classes, Kcfi(code)),
            _bounds(binary, pointers, names.paravirt),
        )
        self._direct: dict[int, tuple[EdgeKind, int]] = {}
        self._choices: dict[int, Site] = {}
        self._owners: dict[int, int] = {}

    def graph(self) -> Graph:
        """Put all edges together."""
        self._add_direct()
        self._add_indirect()
        return Graph(
            *(self.code.starts, self._direct, self._choices, self._owners, self._members),
            *(self.code.owners, self._instructions),
        )

    def _instructions(self, function: int) -> "dict[int, Instruction]":
        body = self.code.body(self.code.owner(function))
        return {instruction.ip: instruction for instruction in body}

    def _members(self, struct: str, member: str) -> tuple[int, ...] | None:
        """Return what a member may point to, None where the types do not have it."""
        place = None if self._layouts is None else self._layouts.member(struct, member)
        if place is None:
            return None
        leaf, kind = place
        return tuple(sorted(self.resolver.member(Member(leaf.owner, leaf.at), kind)))

    def _add_indirect(self) -> None:
        sites = self.survey.sites
        addresses = np.fromiter(sites, np.uint64)
        homes = self._binary.alternatives.origins(addresses)
        owners = self.code.owners(addresses)
        for address, home, owner in zip(sites, homes.tolist(), owners.tolist(), strict=True):
            if owner >= 0:
                self._choices[home] = self.resolver.site(address, sites[address])
                self._owners[home] = self.code.start(owner)

    def _add_direct(self) -> None:
        code, branches = self.code, self.code.branches
        homes = self._binary.alternatives.origins(branches.sites)
        sources, targets = code.owners(branches.sites), code.owners(branches.targets)
        is_call = branches.flows == Flow.CALL
        leaves = is_call | (sources != targets)
        never = np.fromiter((*code.thunks, *code.returns, *code.untraced), np.uint64)
        leaves &= ~np.isin(branches.targets, never) & (sources >= 0) & (targets >= 0)
        leaves &= code.are_code(branches.targets)
        static = static_sites(self._binary, self._names)
        placeholders = self._placeholders()
        for site, home, source, target, call in zip(
            branches.sites[leaves].tolist(),
            homes[leaves].tolist(),
            code.starts[sources[leaves]].tolist(),
            code.starts[targets[leaves]].tolist(),
            is_call[leaves].tolist(),
            strict=True,
        ):
            if site in static or site in placeholders:
                continue
            kind: EdgeKind = "call" if call else "tail jump"
            self._add(home, source, "alternative" if site != home else kind, target)
        for last, start in code.falls:
            owner = code.owner(last)
            if owner >= 0:
                self._add(last, code.start(owner), "falls through", start)
        self._add_static(static)

    def _add(self, site: int, source: int, kind: EdgeKind, target: int) -> None:
        known = self._direct.get(site)
        self._owners[site] = source
        if site in self._choices:
            targets = {*self._choices[site].targets, target}
            self._choices[site] = Site("alternative", tuple(sorted(targets)))
        elif known is None:
            self._direct[site] = (kind, target)
        elif known[1] != target:
            del self._direct[site]
            self._choices[site] = Site("alternative", tuple(sorted((known[1], target))))

    def _add_static(self, sites: dict[int, int]) -> None:
        update = self._binary.address_of(self._names.static_update)
        targets = static_targets(self.code, self.survey, self.resolver, set(sites.values()), update)
        for site, key in sites.items():
            owner = self.code.owner(site)
            if owner >= 0:
                self._owners[site] = self.code.start(owner)
                self._choices[site] = Site("static call", tuple(sorted(targets[key])))

    def _placeholders(self) -> set[int]:
        return {entry.replacement for entry in self._binary.alternatives if entry.direct}


def _layouts(binary: "Binary") -> Layouts | None:
    data = binary.elf.contents(".BTF")
    if not len(data):
        return None
    return Layouts(Btf.parse(data, name=f"{binary.elf.name}: .BTF"))


def _bounds(binary: "Binary", pointers: Pointers, name: str) -> range:
    start = binary.address_of(name)
    variable = None if start is None else pointers.variable(start)
    return range(0) if variable is None else range(*variable)
