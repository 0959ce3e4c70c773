"""Stub CANN libraries, with which the installed torch_npu can be imported on a machine without an NPU.

`python -m tests.npu.bench.stubs OUT_DIR` reads what torch_npu's libraries need (NEEDED entries and undefined symbols,
by readelf and nm), subtracts what the loader, torch and torch_npu itself provide, and builds one shared object for each
library that remains, whose functions return an error code. torch_npu is not imported for this.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# What CANN answers when no device is there; 0 would be taken for success, and the caller would go on with garbage.
ERROR_CODE = 507899
TOOLS = ("gcc", "nm", "readelf")
SYSTEM_LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2")


class StubsError(RuntimeError):
    """The stubs cannot be built here; the message says what is missing."""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StubsError(f"package {name} is not installed in {sys.prefix}: `make .venv-npu/.installed` installs it")
    return Path(spec.origin).parent


def _libraries(package: Path) -> list[Path]:
    return sorted(path for folder in (package, package / "lib") for path in folder.glob("*.so*") if path.is_file())


def needed(library: Path) -> list[str]:
    """The NEEDED entries of a shared object: sonames in the order the loader looks for them."""
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", _run("readelf", "--dynamic", "--wide", str(library)))


def _loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def missing_sonames(libraries: Iterable[Path], provided: Iterable[str]) -> list[str]:
    """The NEEDED entries that neither the loader nor one of the `provided` file names satisfies."""
    wanted = dict.fromkeys(soname for library in libraries for soname in needed(library))
    known = set(provided)
    return [soname for soname in wanted if soname not in known and not _loads(soname)]


def _symbols(library: Path, *, undefined: bool) -> set[str]:
    flag = "--undefined-only" if undefined else "--defined-only"
    listed = [line.split() for line in _run("nm", "--dynamic", flag, str(library)).splitlines()]
    # A weak undefined symbol (w, v) may stay undefined; a version (name@GLIBC_2.2.5) is not part of the name.
    return {fields[-1].split("@")[0] for fields in listed if fields and fields[-2] not in ("w", "v")}


def missing_symbols(libraries: Sequence[Path], providers: Iterable[Path]) -> list[str]:
    """The undefined symbols of `libraries` that neither they, the `providers`, Python nor the system define."""
    undefined = set().union(*(_symbols(library, undefined=True) for library in libraries))
    defined = set().union(*(_symbols(library, undefined=False) for library in (*libraries, *providers)))
    loaded = [ctypes.CDLL(None), *(ctypes.CDLL(soname) for soname in SYSTEM_LIBRARIES if _loads(soname))]
    return sorted(name for name in undefined - defined if not any(hasattr(library, name) for library in loaded))


def source(symbols: Iterable[str]) -> str:
    """C source that defines every symbol as a function that returns an error code.

    A C++ symbol is defined under its mangled name; none of them is called while torch_npu is imported.
    """
    lines = (f'int stub_{number}(void) __asm__("{name}");\nint stub_{number}(void) {{ return {ERROR_CODE}; }}'
             for number, name in enumerate(symbols))
    return "\n".join(lines) + "\n"


def _compile(text: str, soname: str, folder: Path) -> Path:
    library = folder / soname
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", "-x", "c", "-", "-o", str(library)]
    built = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if built.returncode:
        raise StubsError(f"gcc could not build the stub {soname}: {built.stderr.strip()}")
    return library


def build(folder: Path) -> list[Path]:
    """Build the stubs for the installed torch_npu into `folder`; raises StubsError where a tool or package is absent.

    All symbols stand in the first library: the loader binds by name, not by library.
    """
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        raise StubsError(f"{', '.join(absent)} not found: the stubs need gcc and binutils (Debian: apt install gcc)")
    npu, torch = _package_folder("torch_npu"), _package_folder("torch")
    libraries, providers = _libraries(npu), _libraries(torch)
    sonames = missing_sonames(libraries, (path.name for path in (*libraries, *providers)))
    symbols = missing_symbols(libraries, providers)
    if not sonames:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = sonames
    return [_compile(source(symbols), first, folder), *(_compile("", soname, folder) for soname in others)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the shared objects go; put it on LD_LIBRARY_PATH")
    folder = parser.parse_args(arguments).folder
    try:
        built = build(folder)
    except StubsError as error:
        print(f"stubs: {error}", file=sys.stderr)
        return 1
    names = ", ".join(path.name for path in built)
    print(f"{len(built)} stub libraries in {folder}: {names}" if built else "no stub is needed: CANN is installed here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
