"""The output formats of each command's result by name."""

from typing import TYPE_CHECKING, Final

from trapline.report import (
    boot_text,
    explore_lines,
    explore_text,
    json_document,
    json_lines,
    ktap,
    sarif,
    text,
    tradeoff_text,
    verify_lines,
    verify_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trapline.results.boot import BootResult
    from trapline.results.explore import ExploreResult
    from trapline.results.scan import ScanResult
    from trapline.results.tradeoff import TradeoffResult
    from trapline.results.verify import VerifyResult

#: Name -> renderer of a result and a verbosity; only text knows more than one verbosity.
SCAN_FORMATS: "Final[dict[str, Callable[[ScanResult, int], Iterator[bytes]]]]" = {
    "text": text.render,
    "json": lambda result, _: json_document.render(result),
    "jsonl": lambda result, _: json_lines.render(result),
    "sarif": lambda result, _: sarif.render(result),
}

#: The same for a boot.
BOOT_FORMATS: "Final[dict[str, Callable[[BootResult, int], Iterator[bytes]]]]" = {
    "text": boot_text.render,
    "json": lambda result, _: json_document.render(result),
}

#: The same for a campaign.
EXPLORE_FORMATS: "Final[dict[str, Callable[[ExploreResult, int], Iterator[bytes]]]]" = {
    "text": explore_text.render,
    "json": lambda result, _: json_document.render(result),
    "jsonl": lambda result, _: explore_lines.render(result),
    "ktap": lambda result, _: ktap.render(result),
}

#: The same for the designs side by side.
TRADEOFF_FORMATS: "Final[dict[str, Callable[[TradeoffResult, int], Iterator[bytes]]]]" = {
    "text": tradeoff_text.render,
    "json": lambda result, _: json_document.render(result),
}

#: The same for a verification.
VERIFY_FORMATS: "Final[dict[str, Callable[[VerifyResult, int], Iterator[bytes]]]]" = {
    "text": verify_text.render,
    "json": lambda result, _: json_document.render(result),
    "jsonl": lambda result, _: verify_lines.render(result),
}
