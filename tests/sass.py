"""A Triton kernel compiled for a GPU that is not there, and what its machine code says."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Code:
    """Counts of instructions by first word, in all and in the innermost loop with a product."""

    registers: int
    stack: int
    shared: int
    all: Counter[str]
    loop: Counter[str]


class Pretended:
    """What Triton asks of a device before it compiles for it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compiled(kernel: Any, launch: Any, arch: int, folder: Path) -> Code:
    """Compile what a `_Launch` would run on a device, by the way it would go."""
    import triton
    from triton.runtime import driver

    driver.set_active(Pretended(arch))
    made = kernel.warmup(
        *launch.arguments, grid=(launch.blocks,), **launch.constants, **launch.options
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def said(*command: object) -> str:
        words = [str(word) for word in command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    used = said(tools / "cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert found, used
    every, loop = _instructions(said(tools / "nvdisasm", "-c", cubin))
    return Code(int(found[1]), int(found[2]), made.metadata.shared, every, loop)


def _instructions(text: str) -> tuple[Counter[str], Counter[str]]:
    lines: list[str] = []
    labels: dict[str, int] = {}
    for label, instruction in re.findall(
        r"^(?:(\.L_x_\d+):|\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);)", text, re.M
    ):
        if label:
            labels[label] = len(lines)
        else:
            lines.append(instruction)
    words = [re.split(r"[\s.]", line)[0] for line in lines]
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], end + 1) <= end:
            body = words[labels[jump[1]] : end + 1]
            if any("MMA" in word for word in body):
                loops.append(body)
    return Counter(words), Counter(min(loops, key=len, default=[]))


def quiet_cache(folder: str) -> None:
    """Keep Triton's compiled kernels in a folder of the tests, and have it compile."""
    os.environ["TRITON_CACHE_DIR"] = folder
    os.environ.pop("TRITON_INTERPRET", None)
