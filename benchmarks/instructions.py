"""Instructions per score of the Triton kernels, counted in the machine code of what was launched: they bound the speed.

Importing this needs Triton; counting needs the disassembler that Triton's packages bring along, and no GPU.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "Loops", "compiling_for_hopper", "recorded_launches"]


_SPILLED = ("LDL", "STL")


@dataclass(frozen=True)
class Loops:
    """What a kernel's loops over tiles hold.

    Attributes:
        per_score: instructions of each loop per score and thread, in the order of the code.
        spilled: accesses to spilled registers in all of them.
    """

    per_score: tuple[float, ...]
    spilled: int


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched, or compiled for a launch.

    Attributes:
        kernel: its name.
        scores: how many scores of a tile each thread has.
        compiled: Triton's compiled kernel.
    """

    kernel: str
    scores: float
    compiled: Any

    def loops(self) -> Loops:
        """Disassemble the kernel. Raises OSError or subprocess.SubprocessError where the disassembler does not run."""
        loops = _loops(self._machine_code())
        spilled = sum(instruction.startswith(_SPILLED) for loop in loops for instruction in loop)
        return Loops(tuple(len(loop) / self.scores for loop in loops), spilled)

    def spilled(self) -> int:
        """Accesses to spilled registers in the whole kernel. Raises as :meth:`loops`."""
        return len(re.findall(rf"\b(?:{'|'.join(_SPILLED)})\b", self._machine_code()))

    def _machine_code(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def recorded_launches(compile_only: bool = False) -> Iterator[list[Launch]]:
    """Record the Triton kernels launched within the block; with ``compile_only`` they are compiled and not launched."""
    launches: list[Launch] = []
    run = JITFunction.run

    def recording(self, *arguments, grid, warmup, **keywords):
        compiled = run(self, *arguments, grid=grid, warmup=warmup or compile_only, **keywords)
        threads = 32 * keywords.get("num_warps", 4)
        scores = keywords.get("BLOCK_M", 1) * keywords.get("BLOCK_N", 1) / threads
        launches.append(Launch(self.__name__, scores, compiled))
        return compiled

    JITFunction.run = recording
    try:
        yield launches
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def compiling_for_hopper() -> Iterator[list[Launch]]:
    """Compile for sm_90 what is launched within the block, which needs no GPU, and record it.

    Triton has no driver for anything else in this process afterwards.
    """

    class Hopper:
        """As much of a driver as compilation asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Hopper())
    with recorded_launches(compile_only=True) as launches:
        yield launches


def _loops(sass: str) -> list[list[str]]:
    """The instructions of the disassembled loops over tiles: between a branch backwards and its target, with exp2."""
    found = re.findall(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)(?: (0x[0-9a-f]+))?", sass)
    place = {int(address, 16): i for i, (address, _, _) in enumerate(found)}
    names = [name for _, name, _ in found]
    ends = [(place.get(int(target, 16), i), i) for i, (_, name, target) in enumerate(found) if name == "BRA" and target]
    return [names[start : end + 1] for start, end in ends if "MUFU.EX2" in names[start:end]]
