"""What a step is made of."""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Case", "Settings", "Skipped", "described", "triton_fault"]


class Skipped(Exception):
    """Raised by a case that cannot run here; its text is the reason."""


@dataclass(frozen=True)
class Case:
    """One case of a step.

    Attributes:
        name: unique within the step.
        run: returns what was measured, as JSON takes it; raises what is wrong, or :class:`Skipped`.
        needs_triton: skipped, with the reason, where no Triton kernel can run: nothing else is measured in its place.
    """

    name: str
    run: Callable[[], dict[str, object] | None]
    needs_triton: bool = True


@dataclass(frozen=True)
class Settings:
    """What a run is to do.

    Attributes:
        device: "cuda", or "cpu", where Triton's interpreter runs the kernels.
        tiny: sizes of a few rows, which try the script itself out.
        preparing: each case runs once, untimed, to fill the compilers' caches.
    """

    device: str = "cuda"
    tiny: bool = False
    preparing: bool = False

    @property
    def backend(self) -> str:
        """The backend of patched models: on a GPU what users get."""
        return "auto" if self.device == "cuda" or triton_fault() else "triton"

    @property
    def compiler(self) -> str:
        """The backend of ``torch.compile``."""
        return "inductor" if self.device == "cuda" else "aot_eager"

    def seconds(self, budget: float) -> float:
        """The seconds to spend on a timing that may take ``budget`` seconds on a GPU."""
        return 0.0 if self.tiny or self.preparing else budget

    def require_gpu(self, what: str) -> None:
        """Raise :class:`Skipped` on a CPU."""
        if self.device == "cpu":
            raise Skipped(f"{what} need a GPU")


def described(error: BaseException, length: int = 400) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:length]


@functools.cache
def triton_fault() -> str | None:
    """Why no Triton kernel can run here, as one sentence; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    import numpy
    import torch
    import triton

    from hf_multimax.attention.call import make_call
    from hf_multimax.attention.triton.backend import attention

    q = torch.ones(1, 1, 17, 16)
    scalars = torch.zeros(4)
    try:
        attention(make_call(q, q, q, scalars, scalars))
    except Exception as error:  # noqa: BLE001 - the interpreter wraps what it meets in errors of its own
        versions = f"Triton {triton.__version__} with NumPy {numpy.__version__}"
        if "only 0-dimensional arrays" in str(error):
            return f"the interpreter of {versions} does not run: it needs numpy < 2.4 (on a GPU it is not used)"
        return f"the interpreter of {versions} does not run: {error}"
    return None
