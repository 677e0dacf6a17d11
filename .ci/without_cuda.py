"""Lets a CUDA build of torch run on CPUs without CUDA's libraries: gigabytes, and no use there.

    pip install --no-deps torch
    python without_cuda.py requirements > requirements.txt && pip install -r requirements.txt
    python without_cuda.py libraries

``requirements`` prints those of the installed torch that are not CUDA's. ``libraries`` looks for
the shared libraries that torch's own ask for and that neither torch nor the system has, and puts
empty ones beside torch's: with the names and versions that are asked for, and functions that answer
"no device". What torch computes on CPUs is its own. For tests only; needs gcc and readelf. Beside a
CPU build of torch nothing is missing, and nothing is done.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice


def requirements() -> None:
    """Prints what torch requires, without CUDA's packages."""
    for line in importlib.metadata.requires("torch") or []:
        if "extra ==" not in line and not line.startswith(("nvidia-", "cuda-", "triton")):
            print(line)


def readelf(*words: object) -> str:
    """What it prints, on long lines."""
    command = ["readelf", "-W", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loads(name: str) -> bool:
    """Whether the system has this library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


class Asked:
    """What torch's libraries want of others: libraries, their versions, symbols."""

    def __init__(self, libraries: list[Path]) -> None:
        self.needed: set[str] = set()
        self.versions: dict[str, set[str]] = collections.defaultdict(set)  # by library
        self.symbols: dict[str, str] = {}  # the version of each, or ""
        self.defined: set[str] = set()
        for path in libraries:
            self.needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d", path)))
            file = ""
            for line in readelf("-V", path).splitlines():
                if match := re.search(r"File: (\S+)", line):
                    file = match[1]
                elif file and (match := re.search(r"Name: (\S+)\s+Flags", line)):
                    self.versions[file].add(match[1])
            for line in readelf("--dyn-syms", path).splitlines():
                words = line.split()
                if len(words) < 8 or not words[0].endswith(":"):
                    continue
                name, _, version = words[7].partition("@")
                if words[6] != "UND":
                    self.defined.add(name)
                elif words[4] == "GLOBAL":
                    self.symbols.setdefault(name, version.strip("@"))


def function(name: str) -> str:
    """The C code of one that is never to be of use."""
    if re.search(r"Get\w*(String|Name)$", name):
        return f'const char *{name}(void) {{ return ""; }}'
    return f"long {name}(void) {{ return {NO_DEVICE}; }}"


def make(path: Path, versions: dict[str, list[str]]) -> None:
    """An empty library: the names of its functions by version, "" for those without one."""
    nodes = []
    for version, names in sorted(versions.items()):
        inside = f"global: {'; '.join(names)}; " if names else ""
        if version:
            nodes.append(f"{version} {{ {inside}}};")
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "empty.c"), Path(folder, "versions")
        source.write_text("\n".join(function(n) for names in versions.values() for n in names))
        script.write_text("\n".join(nodes))
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{path.name}"]
        if nodes:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, str(source), "-o", str(path)], check=True)


def libraries() -> None:
    """Puts empty libraries beside torch's where some are missing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    folder = Path(spec.origin).parent / "lib"
    own = sorted(folder.glob("*.so*"))
    asked = Asked(own)
    missing = sorted(n for n in asked.needed - {path.name for path in own} if not loads(n))
    print("empty:", " ".join(missing) or "nothing is missing")
    if not missing:
        return
    found = {name: {v: [] for v in asked.versions[name]} for name in missing}
    of_version = {version: name for name in missing for version in found[name]}
    for symbol, version in asked.symbols.items():
        if version in of_version:
            found[of_version[version]][version].append(symbol)
        elif not version and symbol not in asked.defined and re.match(r"_*(cu|nv|nccl)", symbol):
            # One without a version may come from any library.
            found[missing[0]].setdefault("", []).append(symbol)
    for name, versions in found.items():
        make(folder / name, versions)


if __name__ == "__main__":
    {"requirements": requirements, "libraries": libraries}[sys.argv[1]]()
