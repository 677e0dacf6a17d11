"""A Triton kernel compiled for a GPU that is not there, and what its machine code says."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_POINTERS = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """Counts of instructions by first word, in all and in the innermost loop with a product."""

    registers: int
    stack: int
    shared: int
    barriers: int
    all: Counter[str]
    loop: Counter[str]


def compiled(kernel: Any, launch: Any, arch: int, folder: Path, scalars: tuple[str, ...]) -> Code:
    """Compile a `_Launch`; `scalars` names what Triton looks at for multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature, aligned = {}, {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        pointer = isinstance(value, torch.Tensor)
        signature[name] = _POINTERS[value.dtype] if pointer else "i32"
        if pointer or (name in scalars and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(launch.constants), attrs=aligned
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
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
    return Code(int(found[1]), int(found[2]), made.metadata.shared, every["BAR"], every, loop)


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
