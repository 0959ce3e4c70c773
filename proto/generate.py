"""Write runtime/pb from the .proto files: `python proto/generate.py [--check]`."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
PB_DIR = PROTO_DIR.parent / "runtime" / "pb"
OUR_IMPORT = re.compile(r"^from (fmaas|graft)\b", re.MULTILINE)


def main() -> int:
    """Write the modules, or with --check only compare them with what is committed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if runtime/pb is out of date")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        differing = different_files(Path(folder), PB_DIR)
        if not arguments.check:
            install(Path(folder), PB_DIR)
    for path in differing:
        print(f"{'out of date' if arguments.check else 'written'}: runtime/pb/{path}")
    return 1 if arguments.check and differing else 0


def generate(out: Path) -> None:
    """Compile every .proto into `out` as packages under `runtime.pb`."""
    protos = sorted(str(path) for path in PROTO_DIR.rglob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{PROTO_DIR}", f"-I{well_known}", *outputs, *protos]) != 0:
        raise SystemExit("protoc failed")
    for path in out.rglob("*.py*"):
        path.write_text(OUR_IMPORT.sub(r"from runtime.pb.\1", path.read_text()))
    for folder in {path.parent for path in out.rglob("*.py")} | set(out.rglob("*/")) | {out}:
        (folder / "__init__.py").write_text("")


def different_files(left: Path, right: Path) -> list[str]:
    """Relative paths that are missing on one side or differ."""
    names = {str(p.relative_to(root)) for root in (left, right) for p in root.rglob("*.py*") if p.suffix != ".pyc"}
    return sorted(name for name in names if _read(left / name) != _read(right / name))


def install(source: Path, target: Path) -> None:
    """Make `target` hold exactly the modules of `source`."""
    for name in different_files(source, target):
        content = _read(source / name)
        if content is None:
            (target / name).unlink()
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(content)


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
