import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
READ = {"results", "allowlist", "base", "report"}


def test_report_may_import_no_room_but_those_of_documents():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = (each for each in contracts if each.get("source_modules") == ["trapline.report"])
    rooms = {
        path.name
        for path in (ROOT / "src" / "trapline").iterdir()
        if (path / "__init__.py").exists()
    }
    assert set(contract["forbidden_modules"]) == {f"trapline.{room}" for room in rooms - READ}
