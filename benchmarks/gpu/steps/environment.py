"""What the machine is, and that everything imports and a kernel runs on it."""

import importlib
import pkgutil
import shutil
import subprocess

import torch
from torch import Tensor

import hf_multimax
from benchmarks.common import paired_timing
from benchmarks.gpu.cases import Case, Settings, described, triton_fault

__all__ = ["cases"]

_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "pstate")


def cases(settings: Settings) -> list[Case]:
    """Imports first."""
    return [
        Case("imports", _imports, needs_triton=False),
        Case("device", lambda: _device(settings), needs_triton=False),
        Case("tools", _tools, needs_triton=False),
        Case("a kernel runs", lambda: _kernel(settings), needs_triton=False),
        Case("ceilings", lambda: _ceilings(settings), needs_triton=False),
    ]


def _imports() -> dict[str, object]:
    """Every module of the package; those of the kernels need Triton, and some of the adapter's need PEFT."""
    wrong, without = {}, 0
    names = [module.name for module in pkgutil.walk_packages(hf_multimax.__path__, "hf_multimax.")]
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == "peft":
                without += 1
            else:
                wrong[name] = described(error)
        except Exception as error:  # noqa: BLE001 - all of them are to be listed
            wrong[name] = described(error)
    if wrong:
        raise RuntimeError("; ".join(f"{name}: {error}" for name, error in wrong.items()))
    return {"modules imported": len(names) - without}


def _device(settings: Settings) -> dict[str, object]:
    settings.require_gpu("the properties of the device")
    found = torch.cuda.get_device_properties(0)
    described = {
        "gpu": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "memory GiB": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "L2 MiB": found.L2_cache_size / 2**20,
        "shared memory KiB": found.shared_memory_per_block_optin // 1024,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode == 0:
            described |= dict(zip(_QUERY, (value.strip() for value in done.stdout.split(","))))
    return described


def _tools() -> dict[str, object]:
    """What Triton starts: a C compiler for its launchers, the assembler and the disassembler."""
    from triton import knobs

    found = {
        "C compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        "assembler": knobs.nvidia.ptxas.path,
        "disassembler": knobs.nvidia.cuobjdump.path,
    }
    missing = [tool for tool, path in found.items() if not path]
    if missing:
        raise RuntimeError(f"not found: {', '.join(missing)}")
    return dict.fromkeys(found, True)


def _kernel(settings: Settings) -> dict[str, object]:
    from hf_multimax.attention.call import make_call
    from hf_multimax.attention.triton.backend import attention

    if fault := triton_fault():
        raise RuntimeError(fault)
    q, k, v = torch.randn(3, 1, 1, 17, 16, device=settings.device)
    scalars = torch.zeros(4, device=settings.device)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = (attention(make_call(q, k, v, scalars, scalars)) - expected).abs().max().item()
    if not error < 1e-5:
        raise RuntimeError(f"attention with an identity modulator is off by {error:.3g}")
    return {"a kernel's error": error}


def _ceilings(settings: Settings) -> dict[str, object]:
    """What the device gives to a large matrix product and a large copy: yardsticks for all other figures."""
    settings.require_gpu("ceilings")
    n, copied = (256, 2**20) if settings.tiny else (8192, min(2**32, torch.cuda.mem_get_info()[0] // 4))
    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(copied, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    times = paired_timing({"product": lambda: a @ b, "copy": copy}, device="cuda", budget_s=settings.seconds(1.0))
    return {
        "bf16 product TFLOP/s": 2 * n**3 / times["product"].median / 1e12,
        "copy TB/s, read + written": 2 * copied / times["copy"].median / 1e12,
    }
