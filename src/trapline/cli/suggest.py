"""Groups of commands that guess what a mistyped name was meant to be."""

import click

from trapline.base.nearest import nearest


class Group(click.Group):
    """A click group whose error for an unknown command names the nearest ones."""

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
