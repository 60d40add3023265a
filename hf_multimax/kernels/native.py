"""MultiMax attention on CPUs in C++: compiled at first use, cached, and faster than PyTorch's own SoftMax attention.

``native.cpp`` is plain C++ with OpenMP behind a C interface, so that compiling it takes seconds and needs a compiler
only. Its matrix products are PyTorch's own ``sgemm``, its threads those of PyTorch's OpenMP runtime.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import tiled

__all__ = ["attention", "available", "reason", "unsupported"]

logger = logging.getLogger(__name__)

Affine = tuple[Tensor, Tensor]

SOURCE = Path(__file__).with_name("native.cpp")
COMPILE_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
MAX_ORDER = 16
#: query rows of a forward block
ROW_BLOCK, SMALLEST_ROW_BLOCK = 128, 16
#: keys below which splitting them over threads costs more than it gains
SMALLEST_SPLIT = 256


# ------------------------------------------------------------------------------------------------------ public


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    affine: Affine | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """MultiMax attention on a CPU; arguments and result as for :func:`hf_multimax.kernels.tiled.attention`.

    Computes in float32 for float32, bfloat16 and float16 storage. Scores exist in blocks only.

    Raises:
        ValueError, TypeError: as ``tiled.attention``; ValueError for a feature that :func:`unsupported` names.
        RuntimeError: if the extension could not be built; the text says why.
    """
    call = dict(mask=mask, bias=bias, affine=affine, dropout_p=dropout_p, causal=causal, window=window, scale=scale)
    call.update(softcap=softcap, sinks=sinks)
    tiled.check_arguments(q, k, v, ranges, ts, **call)
    missing = unsupported(q, k, v, ranges, ts, **call)
    if missing:
        raise ValueError(f"the native backend does not support {missing}; use backend('tiled') or backend('auto')")
    affine_scale, affine_shift = affine or (None, None)
    tensors = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window, softcap = -1 if window is None else window, 0.0 if softcap is None else softcap
    seed = tiled.dropout_seed(dropout_p)
    return _forward_op(*tensors, seed, dropout_p, causal, window, scale, softcap, training)[0]


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **features: object,
) -> str | None:
    """The first feature of this call that the backend lacks, None where it has them all."""
    if q.device.type != "cpu":
        return f"tensors on {q.device.type}"
    if q.dtype not in TYPES:
        return f"{q.dtype} inputs"
    if ranges.shape[-1] > 2 * MAX_ORDER:
        return f"orders above {MAX_ORDER}"
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None and tensor.dtype not in TYPES:
            return f"a {name} of type {tensor.dtype}"
    if mask is not None and mask.requires_grad:
        return "an additive mask that requires a gradient"
    if bias is not None and bias.requires_grad and bias.shape[-1:] != k.shape[2:3]:
        return "a gradient for a bias that is broadcast over the keys"
    return None


def available() -> bool:
    """Whether the extension is built and loaded; builds it at the first call."""
    return _load()[0] is not None


def reason() -> str:
    """Why :func:`available` is False; empty where it is True."""
    return _load()[1]


# ------------------------------------------------------------------------------------------------------ building


class BuildError(RuntimeError):
    """The extension cannot be built or loaded here."""


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded extension and an empty text, or None and the reason; logs the reason once."""
    try:
        return _build_and_open(), ""
    except (BuildError, OSError) as error:
        text = str(error).strip() or type(error).__name__
        logger.warning("native CPU attention is not available, slower kernels are used: %s", text)
        return None, text


def _build_and_open() -> ctypes.CDLL:
    if platform.system() != "Linux":
        raise BuildError(f"it is built on Linux only, this is {platform.system()}")
    compiler = _compiler()
    runtime = _openmp_runtime()
    flags = (*COMPILE_FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")
    library = _cache_directory() / f"native-{_fingerprint(compiler, flags, runtime)}.so"
    if not library.exists():
        _compile(compiler, flags, runtime, library)
    try:
        return _open(library)
    except OSError:
        # a file that another system or a full disk left behind
        _compile(compiler, flags, runtime, library)
        return _open(library)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler was found; install g++ or set CXX")


def _openmp_runtime() -> Path:
    """PyTorch's own OpenMP library: a second one in the process would bring a second pool of threads."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split(maxsplit=5)[5]) for line in maps if line.count("/")}
    found = sorted(path for path in loaded if path.name.startswith(("libgomp", "libiomp5")))
    if not found:
        raise BuildError("PyTorch was built without a GNU or Intel OpenMP runtime")
    own = Path(torch.__file__).resolve().parent.parent
    return next((path for path in found if own in path.parents), found[0])


def _cache_directory() -> Path:
    """HF_MULTIMAX_CACHE, else hf_multimax below the user's cache folder; a temporary folder where it is read-only."""
    base = os.environ.get("HF_MULTIMAX_CACHE")
    if base:
        directory = Path(base)
    else:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_multimax"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK):
            return directory
    except OSError as error:
        logger.debug("cannot use %s: %s", directory, error)
    return Path(tempfile.mkdtemp(prefix="hf_multimax_"))


def _fingerprint(compiler: str, flags: Sequence[str], runtime: Path) -> str:
    """A name for everything that the compiled file depends on."""
    version = _run([compiler, "--version"])
    parts = (SOURCE.read_text(), version, " ".join(flags), str(runtime), torch.__version__, _cpu_description())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu_description() -> str:
    """The processor's model and instruction sets, without what changes from moment to moment."""
    wanted = ("model name", "flags", "CPU part", "Features")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return platform.machine() + "".join(line for line in lines if line.startswith(wanted))


def _compile(compiler: str, flags: Sequence[str], runtime: Path, library: Path) -> None:
    """Compile beside the cache's file and move it there in one step, as other processes may be doing the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder) / "native.o", Path(folder) / "native.so"
        _run([compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        # linked without -fopenmp, which would add the compiler's own OpenMP runtime
        _run([compiler, "-shared", str(compiled), str(runtime), "-o", str(linked)])
        os.replace(linked, library)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{Path(command[0]).name} failed: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{Path(command[0]).name} took longer than {error.timeout:.0f} s") from error
    return done.stdout


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.multimax_arguments_size.restype = ctypes.c_int64
    if library.multimax_arguments_size() != ctypes.sizeof(Arguments):
        raise BuildError(f"{path} was built for another version of this package; delete it")
    for function in (library.multimax_forward, library.multimax_backward):
        function.argtypes, function.restype = [ctypes.POINTER(Arguments)], None
    library.sgemm_address = _sgemm_address()
    return library


def _sgemm_address() -> int:
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(own)).sgemm_, ctypes.c_void_p).value or 0
    except (OSError, AttributeError) as error:
        raise BuildError("this build of PyTorch exports no sgemm_") from error


# ------------------------------------------------------------------------------------------------------ calling


class View(ctypes.Structure):
    """``View`` of native.cpp."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4), ("type", ctypes.c_int64)]


VIEWS = ("q", "k", "v", "out", "grad_out", "bias", "mask", "grad_k", "grad_v")
POINTERS = (
    "out32", "lse", "delta", "grad_q", "grad_bias", "grad_scalars", "ranges", "ts", "affine", "sinks", "sgemm",
)  # fmt: skip
INTEGERS = (
    "batch", "heads", "kv_heads", "rows", "keys", "dim", "value_dim", "order", "parameter_stride", "affine_stride",
    "causal", "window", "row_block", "splits", "threads", "seed",
)  # fmt: skip
REALS = ("scale", "softcap", "dropout")


class Arguments(ctypes.Structure):
    """``Arguments`` of native.cpp."""

    _fields_ = [
        *((name, View) for name in VIEWS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("grad_bias_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_double) for name in REALS),
    ]


class Call:
    """The arguments of one C call, and the tensors that its pointers need alive."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor) -> None:
        self.arguments, self._kept = Arguments(), []
        a = self.arguments
        a.batch, a.heads, a.rows, a.dim = q.shape
        a.kv_heads, a.keys, a.value_dim = k.shape[1], k.shape[2], v.shape[3]
        a.order, a.parameter_stride = ranges.shape[-1] // 2, ranges.shape[-1] if ranges.ndim == 2 else 0
        a.threads = torch.get_num_threads()
        a.splits = 1
        self.views(q=_dense_rows(q), k=_dense_rows(k), v=_dense_rows(v))
        self.pointers(ranges=_parameter(ranges), ts=_parameter(ts))

    def views(self, **tensors: Tensor) -> None:
        """Set ``[batch, heads, rows, columns]`` views."""
        for name, x in tensors.items():
            self._kept.append(x)
            setattr(self.arguments, name, View(x.data_ptr(), x.stride(), TYPES[x.dtype]))

    def pointers(self, **tensors: Tensor) -> None:
        """Set pointers to contiguous tensors."""
        for name, x in tensors.items():
            self._kept.append(x)
            setattr(self.arguments, name, x.data_ptr())

    def features(
        self, mask: Tensor | None, bias: Tensor | None, affine_scale: Tensor | None, affine_shift: Tensor | None,
        sinks: Tensor | None, seed: Tensor | None, dropout_p: float, causal: bool, window: int, scale: float,
        softcap: float,
    ) -> None:  # fmt: skip
        """Set everything that a call may do without."""
        a = self.arguments
        a.causal, a.window, a.scale, a.softcap = causal, window, scale, softcap
        shape = (a.batch, a.heads, a.rows, a.keys)
        for name, tensor in (("mask", mask), ("bias", bias)):
            if tensor is not None:
                self.views(**{name: tensor.expand(shape)})
        if affine_scale is not None and affine_shift is not None:
            pair = torch.stack(torch.broadcast_tensors(_parameter(affine_scale), _parameter(affine_shift)), -1)
            a.affine_stride = 2 if pair.ndim == 2 else 0
            self.pointers(affine=pair)
        if sinks is not None:
            self.pointers(sinks=_parameter(sinks))
        if seed is not None:
            a.seed, a.dropout = int(seed), dropout_p

    def run(self, name: str) -> None:
        """Call ``multimax_<name>`` of the extension."""
        library, why = _load()
        if library is None:
            raise RuntimeError(f"native CPU attention is not available: {why}; use backend('tiled')")
        self.arguments.sgemm = library.sgemm_address
        getattr(library, f"multimax_{name}")(ctypes.byref(self.arguments))


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` with rows that sgemm can read: unit stride within, and at least their length apart."""
    dense = (x.stride(3) == 1 and x.stride(2) >= x.shape[3]) or (x.shape[3] == 1 and x.stride(2) >= 1)
    return x if dense else x.contiguous()


def _parameter(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _forward_split(batch: int, heads: int, rows: int, keys: int, threads: int) -> tuple[int, int]:
    """(rows of a block, key splits) that give every thread work: smaller blocks first, then splits of the keys."""
    blocks = max(1, -(-rows // ROW_BLOCK))
    while threads > 1 and batch * heads * blocks < 2 * threads and -(-rows // blocks) > 2 * SMALLEST_ROW_BLOCK:
        blocks *= 2
    items = batch * heads * blocks
    splits = 1
    if items < threads:
        splits = max(1, min(-(-threads // items), keys // SMALLEST_SPLIT))
    row_block = -(-rows // blocks)
    return row_block + -row_block % 8 if row_block > 8 else max(row_block, 1), splits


def _merge_splits(partial: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the outputs ``[splits, ..., Dv]`` of disjoint keys by their log-sum-exps ``[splits, ...]``."""
    total = lse.logsumexp(0)
    weight = (lse - total).exp().masked_fill_(total == float("-inf"), 0.0)
    return (partial * weight.unsqueeze(-1)).sum(0), total


@torch.library.custom_op("hf_multimax::native_attention", mutates_args=(), device_types="cpu")
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, out32, lse = _outputs(q, v, training)
    if not out.numel():
        return out, out32, lse
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    a = call.arguments
    a.row_block, a.splits = _forward_split(*q.shape[:3], k.shape[2], a.threads)
    call.views(out=out)
    if a.splits > 1:
        partial = torch.empty((a.splits, *out.shape), dtype=torch.float32)
        partial_lse = torch.empty((a.splits, *lse.shape), dtype=torch.float32)
        call.pointers(out32=partial, lse=partial_lse)
        call.run("forward")
        merged, total = _merge_splits(partial, partial_lse)
        lse.copy_(total)
        out.copy_(merged)
        if out32.numel():
            out32.copy_(merged)
        return out, out32, lse
    call.pointers(lse=lse)
    if out32.numel():
        call.pointers(out32=out32)
    call.run("forward")
    return out, out32, lse


def _outputs(q: Tensor, v: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(result, its float32 copy or nothing, log-sum-exp per row): a rounded result would spoil the scalars' gradients."""
    shape = (*q.shape[:3], v.shape[3])
    copy = shape if training and v.dtype != torch.float32 else (0,)
    return (
        torch.empty(shape, dtype=v.dtype, device=v.device),
        torch.empty(copy, dtype=torch.float32, device=v.device),
        torch.empty(q.shape[:3], dtype=torch.float32, device=v.device),
    )


@_forward_op.register_fake
def _(q, k, v, *rest):
    return _outputs(q, v, rest[-1])


@torch.library.custom_op("hf_multimax::native_attention_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad_out: Tensor,
    out32: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    if not grad_out.numel() or not k.numel():
        return [
            torch.zeros_like(x) if wanted and x is not None else q.new_empty(0) for x, wanted in zip(inputs, needed)
        ]
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    a = call.arguments
    a.splits = _backward_splits(q, k, bias if needed[6] else None, a.threads)
    grad_q = torch.zeros((a.splits, *q.shape), dtype=torch.float32)
    grad_k, grad_v = torch.empty(k.shape, dtype=k.dtype), torch.empty(v.shape, dtype=v.dtype)
    delta = torch.empty_like(lse)
    call.views(grad_out=_dense_rows(grad_out), grad_k=grad_k, grad_v=grad_v)
    call.pointers(out32=out32, lse=lse, delta=delta, grad_q=grad_q)
    scalars = grad_bias = None
    if any(needed[i] for i in (3, 4, 7, 8)):
        scalars = torch.zeros((a.splits, a.batch, a.heads, 4 * a.order + 2), dtype=torch.float64)
        call.pointers(grad_scalars=scalars)
    if needed[6] and bias is not None:
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32)
        strides = grad_bias.expand(a.batch, a.heads, a.rows, a.keys).stride()
        a.grad_bias_stride[:] = strides
        call.pointers(grad_bias=grad_bias)
    call.run("backward")
    grads = [grad_q[0] if a.splits == 1 else grad_q.sum(0), grad_k, grad_v, *_scalar_gradients(scalars, a.order)]
    grads[5:5] = [None, grad_bias]
    grads.append(_sink_gradient(sinks, lse, delta))
    return [
        tiled.fitted(grad, x) if wanted and x is not None else q.new_empty(0)
        for grad, x, wanted in zip(grads, inputs, needed)
    ]


def _backward_splits(q: Tensor, k: Tensor, bias: Tensor | None, threads: int) -> int:
    """Key splits that give every thread work where key-value heads are few; each costs one more copy of q's gradient."""
    items = q.shape[0] * k.shape[1]
    if bias is not None:  # heads that share a bias entry go to one thread
        shape = (1,) * (4 - bias.ndim) + bias.shape
        items = (q.shape[0] if shape[0] > 1 else 1) * (k.shape[1] if shape[1] > 1 else 1)
    if threads == 1 or items >= 2 * threads:
        return 1
    return max(1, min(-(-2 * threads // items), k.shape[2] // 64))


def _scalar_gradients(partial: Tensor | None, order: int) -> list[Tensor | None]:
    """Per-head gradients of (ranges, ts, scale, shift) from the partial sums ``[splits, B, H, 4N + 2]``."""
    if partial is None:
        return [None] * 4
    total = partial.sum((0, 1))
    return [total[:, : 2 * order], total[:, 2 * order : 4 * order], total[:, -2], total[:, -1]]


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """A sink's share of every row, ``exp(sink - lse)``, takes ``-delta``."""
    if sinks is None:
        return None
    share = (sinks.float()[:, None] - lse).exp().masked_fill_(lse == float("-inf"), 0.0)
    return -(share.double() * delta).sum((0, 2))


@_backward_op.register_fake
def _(grad_out, out32, lse, *rest):
    return tiled.fake_gradients(rest[: tiled.DIFFERENTIABLE], rest[-1])


def _save(ctx, inputs, output) -> None:
    *inputs, _training = inputs
    tensors, ctx.options = inputs[: tiled.DIFFERENTIABLE + 1], inputs[tiled.DIFFERENTIABLE + 1 :]
    out, out32, lse = output
    ctx.save_for_backward(out32 if out32.numel() else out, lse, *tensors)


def _differentiate(ctx, grad_out: Tensor, _grad_out32: Tensor, _grad_lse: Tensor):
    needed = list(ctx.needs_input_grad[: tiled.DIFFERENTIABLE])
    grads = _backward_op(grad_out, *ctx.saved_tensors, *ctx.options, needed)
    absent = [None] * (2 + len(ctx.options))
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), *absent


_forward_op.register_autograd(_differentiate, setup_context=_save)
