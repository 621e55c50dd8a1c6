"""Commands whose --help has options in groups and examples; groups that know mistyped names."""

from typing import TYPE_CHECKING, Any

import click

from trapline.base.nearest import nearest

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
            if not isinstance(parameter, click.Option):
                continue  # what an argument is, the text above says
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
        """Write the examples."""
        del ctx
        _write_examples(self.examples, formatter)


class Group(click.Group):
    """Knows its examples; its error for an unknown command names the nearest ones."""

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 - whatever click.Group takes
        examples: tuple[str, ...] = (),
        **keywords: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.examples = examples

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of their definition, in which a user meets them."""
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with a sentence."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-") and not ctx.resilient_parsing:
            close = nearest(args[0], known)
            hint = f"did you mean {' or '.join(close)}?" if close else f"try {', '.join(known)}."
            ctx.fail(f"{ctx.command_path} has no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        del ctx
        _write_examples(self.examples, formatter)


def _write_examples(examples: tuple[str, ...], formatter: click.HelpFormatter) -> None:
    """Write each on a line of its own, so that it can be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
