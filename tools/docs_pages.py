# ruff: noqa: INP001 - mkdocs loads a hook by its path; this is no package
"""mkdocs hook: pages that are made from the source, so that they cannot go stale.

`cli.md` comes from click's command tree, `changelog.md` from CHANGELOG.md.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from mkdocs.structure.files import File

from trapline.cli.command import Command
from trapline.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages; mkdocs calls this once per build."""
    files.append(File.generated(config, "cli.md", content=cli_reference()))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changelog))
    return files


def cli_reference() -> str:
    """Write the whole command tree as Markdown."""
    context = click.Context(cli, info_name="trapline", **cli.context_settings)
    parts = [
        "# Command line\n",
        f"{cli.help}\n",
        "Exit codes are the same for every command: see [Exit codes](exit-codes.md).\n",
    ]
    parts += [_section(cli, context, name, 2) for name in cli.list_commands(context)]
    return "\n".join(parts)


def _section(group: click.Group, parent: click.Context, name: str, level: int) -> str:
    command = group.get_command(parent, name)
    if command is None:
        raise LookupError(name)
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f"{'#' * level} {context.command_path}\n",
        f"```text\n{context.command_path} {usage}\n```\n",
        f"{_help(command)}\n",
    ]
    if isinstance(command, Command):
        parts += _grouped(command, context)
    if isinstance(command, click.Group):
        parts += [
            _section(command, context, child, level + 1) for child in command.list_commands(context)
        ]
    return "\n".join(parts)


def _help(command: click.Command) -> str:
    # \b marks paragraphs that click must not wrap again.
    return (command.help or "").replace("\b\n", "")


def _grouped(command: Command, context: click.Context) -> "Iterator[str]":
    for heading, records in command.grouped(context):
        yield f"**{heading}**\n"
        for names, text in records:
            yield f"`{names}`\n:   {text}\n"
    examples = "\n".join(command.examples)
    yield f"```sh\n{examples}\n```\n"
