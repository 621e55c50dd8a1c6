"""A command whose --help has its options in groups, and examples below them."""

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Command(click.Command):
    """Knows its examples, and which of its options belong together.

    `groups` maps a heading to names of parameters; what is in no group is listed last, below
    "Options". `examples` are command lines that a shell takes as they are.
    """

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 - whatever click.Command takes
        groups: "Mapping[str, tuple[str, ...]] | None" = None,
        examples: tuple[str, ...] = (),
        **keywords: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.groups = dict(groups or {})
        self.examples = examples

    def grouped(self, context: click.Context) -> "Iterator[tuple[str, list[tuple[str, str]]]]":
        """Yield each heading with the (option, help) pairs below it, in order."""
        heading_of = {name: heading for heading, names in self.groups.items() for name in names}
        found: dict[str, list[tuple[str, str]]] = {heading: [] for heading in self.groups}
        found["Options"] = []
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                found[heading_of.get(parameter.name or "", "Options")].append(record)
        yield from ((heading, records) for heading, records in found.items() if records)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        for heading, records in self.grouped(ctx):
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each on its own line."""
        del ctx
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
