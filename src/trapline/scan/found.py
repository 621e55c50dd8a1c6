"""What the scan of one object finds: sites and mappings that only the whole kernel can name.

An id counts the sites that look the same in all objects; driver and subsystem are known from all
modules. So a finding has two types: it is found as one of these, and becomes a `Site` or `Mapping`
of the result with what they lack.
"""

from typing import NamedTuple

import msgspec

from trapline.linux.ve_handler import Emulation
from trapline.results.scan import Access, Form, Mapping, Site
from trapline.results.trapclass import TrapClass
from trapline.scan.identity import Key, key
from trapline.scan.location import Place


class What(NamedTuple):
    """What a site is, apart from where; `normal` is its instruction as ids have it."""

    trap: TrapClass
    form: Form
    access: Access
    width: int
    accessor: str | None
    text: str
    normal: str
    verdict: Emulation
    mapped_by: str | None = None


class FoundSite(msgspec.Struct, frozen=True, kw_only=True):
    """A place that may trap, `at` an address of its object.

    `bytes` are its instruction, in hexadecimal.
    """

    at: int
    module: str
    what: What
    place: Place
    bytes: str

    @property
    def key(self) -> Key:
        """What its id is made from."""
        place, what = self.place, self.what
        where = place.object or self.module
        return key(what.form, where, place.function, place.inlined, what.accessor, what.normal)

    def named(self, identity: str, driver: str | None, subsystem: str) -> Site:
        """Return the site of the result."""
        what, place = self.what, self.place
        return Site(
            id=identity,
            trap=what.trap,
            form=what.form,
            access=what.access,
            width=what.width,
            accessor=what.accessor,
            module=self.module,
            object=place.object,
            function=place.function,
            file=place.file,
            line=place.line,
            inlined=place.inlined,
            instruction=what.text,
            bytes=self.bytes,
            address=place.address,
            section=place.section,
            origin=place.origin,
            emulable=what.verdict.emulable,
            reason=what.verdict.reason,
            driver=driver,
            subsystem=subsystem,
            mapped_by=what.mapped_by,
        )


class FoundMapping(msgspec.Struct, frozen=True, kw_only=True):
    """A call of `mapper`, which maps device memory."""

    module: str
    mapper: str
    place: Place

    @property
    def key(self) -> Key:
        """What its id is made from."""
        place = self.place
        where = place.object or self.module
        return key("mapping", where, place.function, place.inlined, self.mapper, "")

    def named(self, identity: str, driver: str | None, subsystem: str) -> Mapping:
        """Return the mapping of the result."""
        place = self.place
        return Mapping(
            id=identity,
            mapper=self.mapper,
            module=self.module,
            object=place.object,
            function=place.function,
            file=place.file,
            line=place.line,
            inlined=place.inlined,
            address=place.address,
            section=place.section,
            driver=driver,
            subsystem=subsystem,
        )
