"""How many finding ids survive from one kernel to another, and whether any names another place.

    python benchmarks/ids.py OLD NEW [--same-source]

OLD and NEW are kernels, as `trapline scan` takes them. A place is what debug information says of a
site by other means than the id: object, class, the functions around it with file and line; for
kernels of unlike sources the lines are those in each function. Without --same-source, likes that an
edit above moved in their function are other places: what is counted is unchanged source.
"""

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING

import trapline
from trapline.kernel.elf.functions import source_name

if TYPE_CHECKING:
    from trapline.results.scan import Site


def place(site: "Site", *, same_source: bool) -> tuple[object, ...]:
    """Say where a site is, without the compiler's choices."""
    what = (site.object or site.module, site.form, site.trap, site.access, site.width)
    if not same_source:
        return (*what, site.owner or site.function, site.spot)
    frames = [(source_name(f.function), f.file, f.line) for f in site.inlined]
    frames.append((source_name(site.function), site.file, site.line))
    names = [name for name, _, _ in frames]
    frames = frames[: names.index(site.owner) + 1] if site.owner in names else frames
    if len(frames) > 1:
        # Which of several statements of inline assembly the compiler was given, an #ifdef decides.
        frames[0] = frames[0][:2]
    return (*what, tuple(frames))


def main() -> None:
    """Print one line for each question."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--same-source", action="store_true", help="the compilers differ only")
    options = parser.parse_args()
    started = time.monotonic()
    old = {
        s.id: place(s, same_source=options.same_source) for s in trapline.scan(options.old).sites
    }
    new = {
        s.id: place(s, same_source=options.same_source) for s in trapline.scan(options.new).sites
    }
    kept = old.keys() & new.keys()
    both = Counter(old.values()) & Counter(new.values())
    survived = Counter(old[i] for i in kept if old[i] == new[i]) & both
    elsewhere = [i for i in kept if old[i] != new[i]]
    print(f"scans: {time.monotonic() - started:.0f} s")
    print(
        f"ids: {len(old):,} and {len(new):,}; in both: {len(kept):,} ({len(kept) / len(old):.2%})"
    )
    print(
        f"places in both: {both.total():,}; with their id: {survived.total():,} "
        f"({survived.total() / both.total():.2%})"
    )
    print(f"ids at another place: {len(elsewhere):,}")
    for identity in elsewhere[:10]:
        print(f"  {old[identity]}\n  {new[identity]}")


if __name__ == "__main__":
    main()
