"""What the scan of one object finds: sites and mappings that only the whole kernel can name.

An id counts the sites that look the same in all objects; driver and subsystem are known from all
modules. So a finding has two types: it is found as one of these, and becomes a `Site` or `Mapping`
of the result with what they lack.
"""

from typing import NamedTuple

import msgspec

from trapline.kernel.elf.functions import source_name
from trapline.linux.spelling import canonical
from trapline.linux.ve_handler import Emulation
from trapline.results.scan import Access, Form, Mapping, Site
from trapline.results.trapclass import TrapClass
from trapline.scan.identity import Key
from trapline.scan.location import Place
from trapline.scan.spots import Spot


class What(NamedTuple):
    """What a site is, apart from where."""

    trap: TrapClass
    form: Form
    access: Access
    width: int
    accessor: str | None
    text: str
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
    spot: Spot | None = None

    @property
    def key(self) -> Key:
        """What its id is made from."""
        what = self.what
        access = None if what.accessor is None else canonical(what.accessor)
        named = (what.form, what.trap, what.access, str(what.width))
        return _key(named, access, self.place, self.module, self.spot)

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
            **_beside(self.spot),
        )


class FoundMapping(msgspec.Struct, frozen=True, kw_only=True):
    """A call of `mapper`, which maps device memory."""

    module: str
    mapper: str
    place: Place
    spot: Spot | None = None

    @property
    def key(self) -> Key:
        """What its id is made from."""
        return _key(("mapping",), self.mapper, self.place, self.module, self.spot)

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
            **_beside(self.spot),
        )


def _key(
    what: tuple[str, ...], access: str | None, place: Place, module: str, spot: Spot | None
) -> Key:
    """Make a key; without debug information of the function by what its symbol says."""
    where = place.object or module
    if spot is None:
        chain = tuple(source_name(frame.function) for frame in reversed(place.inlined))
        return Key((*what, where, source_name(place.function), *chain, "", access or ""))
    return Key(
        (*what, where, spot.function, *spot.wrappers, "", spot.access or access or ""),
        spot.calls,
        "" if spot.line is None else str(spot.line),
        "/".join(spot.landed),
        spot.landed_at,
    )


def _beside(spot: Spot | None) -> dict[str, str | None]:
    """Give what the result says of a spot beside the id."""
    if spot is None:
        return {}
    at = spot.calls if spot.line is None else f"{spot.calls} {spot.line}".lstrip()
    return {"owner": spot.function, "spot": at, "landed": "/".join(spot.landed) or None}
