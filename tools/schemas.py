#!/usr/bin/env python3
"""Write docs/schemas anew from the types that the documents are made of."""

from pathlib import Path

from trapline.report.schemas import SCHEMAS, render

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"

for path in FOLDER.glob("*.schema.json"):
    path.unlink()
for name in SCHEMAS:
    (FOLDER / f"{name}.schema.json").write_bytes(render(name))
