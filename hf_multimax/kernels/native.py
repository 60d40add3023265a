"""MultiMax attention on CPUs in C++: compiled at first use, cached, and faster than PyTorch's own SoftMax attention.

``native.cpp`` is plain C++ with OpenMP behind a C interface, so that compiling it takes seconds and needs a compiler
only. Its threads are those of PyTorch's OpenMP runtime.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import refuse_second_derivative, tiled

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
    tiled.check_arguments(q, k, v, ranges, ts, mask, bias, affine, dropout_p, causal, window, softcap, sinks)
    missing = unsupported(q, k, v, ranges, ts, mask=mask, bias=bias)
    if missing:
        raise ValueError(f"the native backend does not support {missing}; use backend('tiled') or backend('auto')")
    affine_scale, affine_shift = affine or (None, None)
    tensors = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window, softcap = -1 if window is None else window, 0.0 if softcap is None else softcap
    seed = tiled.dropout_seed(dropout_p)
    arguments = (*tensors, seed, dropout_p, causal, window, scale, softcap)
    unseen = _unseen(q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(*arguments) if unseen else _training_op(*arguments)[0]
    return _inference(*arguments) if unseen else _inference_op(*arguments)


def _unseen(q: Tensor) -> bool:
    """Whether nothing traces, transforms or intercepts operators, so that dispatching them would be time lost."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(q) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


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
    if library.multimax_arguments_size() != PACKED.size:
        raise BuildError(f"{path} was built for another version of this package; delete it")
    for function in (library.multimax_forward, library.multimax_backward):
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return library


# ------------------------------------------------------------------------------------------------------ calling

# ``Arguments`` of native.cpp, every field of which is made of 64-bit words. A struct packed at once costs a tenth of
# a ctypes.Structure filled field by field, which decoding one token would notice.
VIEWS = ("q", "k", "v", "out", "grad_out", "bias", "mask", "grad_k", "grad_v")
VIEW_WORDS = 6  # data, four strides, type
POINTERS = (
    "out32", "top", "total", "peak", "delta", "grad_q", "grad_bias", "grad_scalars", "ranges", "ts", "affine", "sinks",
)  # fmt: skip
STRIDES = "grad_bias_stride"
INTEGERS = (
    "batch", "heads", "kv_heads", "rows", "keys", "dim", "value_dim", "order", "parameter_stride", "affine_stride",
    "causal", "window", "row_block", "splits", "threads", "seed",
)  # fmt: skip
REALS = ("scale", "softcap", "dropout")


def _offsets() -> tuple[dict[str, int], int]:
    """The first word of every field, and the number of words."""
    sizes = [(name, VIEW_WORDS) for name in VIEWS]
    sizes += [(name, 1) for name in POINTERS] + [(STRIDES, 4)] + [(name, 1) for name in (*INTEGERS, *REALS)]
    offsets, word = {}, 0
    for name, size in sizes:
        offsets[name], word = word, word + size
    return offsets, word


OFFSETS, WORDS = _offsets()
PACKED = struct.Struct(f"={WORDS - len(REALS)}q{len(REALS)}d")


class Call:
    """The arguments of one C call, and the tensors that its pointers need alive."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor) -> None:
        self._words: list[int | float] = [0] * WORDS
        self._kept: list[Tensor] = []
        self.batch, self.heads, self.rows, dim = q.shape
        self.kv_heads, self.keys = k.shape[1], k.shape[2]
        self.order, self.threads = ranges.shape[-1] // 2, torch.get_num_threads()
        self.set(
            batch=self.batch, heads=self.heads, rows=self.rows, dim=dim, kv_heads=self.kv_heads, keys=self.keys,
            value_dim=v.shape[3], order=self.order, parameter_stride=ranges.shape[-1] if ranges.ndim == 2 else 0,
            threads=self.threads, splits=1,
        )  # fmt: skip
        self.views(q=_dense_rows(q), k=_dense_rows(k), v=_dense_rows(v))
        self.pointers(ranges=_parameter(ranges), ts=_parameter(ts))

    def set(self, **values: int | float) -> None:
        """Set numbers."""
        for name, value in values.items():
            self._words[OFFSETS[name]] = value

    def views(self, **tensors: Tensor) -> None:
        """Set ``[batch, heads, rows, columns]`` views."""
        for name, x in tensors.items():
            self._kept.append(x)
            start = OFFSETS[name]
            self._words[start : start + VIEW_WORDS] = x.data_ptr(), *x.stride(), TYPES[x.dtype]

    def pointers(self, **tensors: Tensor) -> None:
        """Set pointers to contiguous tensors."""
        for name, x in tensors.items():
            self._kept.append(x)
            self._words[OFFSETS[name]] = x.data_ptr()

    def features(
        self, mask: Tensor | None, bias: Tensor | None, affine_scale: Tensor | None, affine_shift: Tensor | None,
        sinks: Tensor | None, seed: Tensor | None, dropout_p: float, causal: bool, window: int, scale: float,
        softcap: float,
    ) -> None:  # fmt: skip
        """Set everything that a call may do without."""
        self.set(causal=causal, window=window, scale=scale, softcap=softcap)
        shape = (self.batch, self.heads, self.rows, self.keys)
        for name, tensor in (("mask", mask), ("bias", bias)):
            if tensor is not None:
                self.views(**{name: tensor.expand(shape)})
        if affine_scale is not None and affine_shift is not None:
            pair = torch.stack(torch.broadcast_tensors(_parameter(affine_scale), _parameter(affine_shift)), -1)
            self.set(affine_stride=2 if pair.ndim == 2 else 0)
            self.pointers(affine=pair)
        if sinks is not None:
            self.pointers(sinks=_parameter(sinks))
        if seed is not None:
            self.set(seed=int(seed), dropout=dropout_p)

    def grad_bias(self, grad: Tensor) -> None:
        """Set the contiguous accumulator for the bias's gradient."""
        start = OFFSETS[STRIDES]
        self._words[start : start + 4] = grad.expand(self.batch, self.heads, self.rows, self.keys).stride()
        self.pointers(grad_bias=grad)

    def run(self, name: str) -> None:
        """Call ``multimax_<name>`` of the extension."""
        library, why = _load()
        if library is None:
            raise RuntimeError(f"native CPU attention is not available: {why}; use backend('tiled')")
        getattr(library, f"multimax_{name}")(PACKED.pack(*self._words))


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` with unit stride within its rows."""
    dense = (x.stride(3) == 1 and x.stride(2) >= x.shape[3]) or (x.shape[3] == 1 and x.stride(2) >= 1)
    return x if dense else x.contiguous()


def _parameter(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


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


def _merge_splits(partial: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Join the outputs ``[splits, ..., Dv]`` of disjoint keys by their statistics ``[3, splits, ...]``."""
    tops, totals, peaks = stats
    top, best = tops.max(0, keepdim=True)
    weights = totals * (tops - top).exp().masked_fill_(totals == 0, 0.0)
    total = weights.sum(0)
    shares = (weights / total).masked_fill_(total == 0, 0.0)
    return (partial * shares.unsqueeze(-1)).sum(0), torch.stack((top[0], total, peaks.gather(0, best)[0]))


def _inference(
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
) -> Tensor:
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype)
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    _run_forward(call, out, None, None)
    return out


def _training(
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
) -> tuple[Tensor, Tensor, Tensor]:
    out, out32, stats = _outputs(q, v)
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    _run_forward(call, out, out32 if out32.numel() else None, stats)
    return out, out32, stats


def _run_forward(call: Call, out: Tensor, out32: Tensor | None, stats: Tensor | None) -> None:
    """Compute the result and, where given, its float32 copy and the rows' statistics."""
    if not out.numel():
        return
    row_block, splits = _forward_split(call.batch, call.heads, call.rows, call.keys, call.threads)
    call.set(row_block=row_block, splits=splits)
    call.views(out=out)
    if splits > 1:
        partial = torch.empty((splits, *out.shape), dtype=torch.float32)
        partial_stats = torch.empty((3, splits, *out.shape[:3]), dtype=torch.float32)
        call.pointers(out32=partial, **_named(partial_stats))
        call.run("forward")
        merged, merged_stats = _merge_splits(partial, partial_stats)
        out.copy_(merged)
        if out32 is not None:
            out32.copy_(merged)
        if stats is not None:
            stats.copy_(merged_stats)
        return
    if stats is not None:
        call.pointers(**_named(stats))
    if out32 is not None:
        call.pointers(out32=out32)
    call.run("forward")


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(result, its float32 copy or nothing, ``[3, B, H, Nq]`` statistics of every row).

    The copy is there because a rounded result would spoil the gradients of the scalars.
    """
    shape = (*q.shape[:3], v.shape[3])
    copy = shape if v.dtype != torch.float32 else (0,)
    return (
        torch.empty(shape, dtype=v.dtype, device=v.device),
        torch.empty(copy, dtype=torch.float32, device=v.device),
        torch.empty((3, *q.shape[:3]), dtype=torch.float32, device=v.device),
    )


def _named(stats: Tensor) -> dict[str, Tensor]:
    """A row's largest modulated score, its sum of exponentials relative to that, and that score before sigma."""
    return {"top": stats[0], "total": stats[1], "peak": stats[2]}


def _fake_inference(q, k, v, *rest):
    return v.new_empty((*q.shape[:3], v.shape[3]))


def _fake_training(q, k, v, *rest):
    return _outputs(q, v)


def _backward(
    grad_out: Tensor,
    out32: Tensor,
    stats: Tensor,
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
    splits = _backward_splits(q, k, bias if needed[6] else None, call.threads)
    call.set(splits=splits)
    grad_q = torch.zeros((splits, *q.shape), dtype=torch.float32)
    grad_k, grad_v = torch.empty(k.shape, dtype=k.dtype), torch.empty(v.shape, dtype=v.dtype)
    delta = torch.empty(q.shape[:3], dtype=torch.float32)
    call.views(grad_out=_dense_rows(grad_out), grad_k=grad_k, grad_v=grad_v)
    call.pointers(out32=out32, delta=delta, grad_q=grad_q, **_named(stats))
    scalars = grad_bias = None
    if any(needed[i] for i in (3, 4, 7, 8)):
        scalars = torch.zeros((splits, call.batch, call.heads, 4 * call.order + 2), dtype=torch.float64)
        call.pointers(grad_scalars=scalars)
    if needed[6] and bias is not None:
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32)
        call.grad_bias(grad_bias)
    call.run("backward")
    grads = (
        grad_q[0] if splits == 1 else grad_q.sum(0), grad_k, grad_v, *_scalar_gradients(scalars, call.order),
        _sink_gradient(sinks, stats, delta),
    )  # fmt: skip
    return [
        tiled.fitted(grad, x) if wanted and x is not None else q.new_empty(0)
        for grad, x, wanted in zip((*grads[:5], None, grad_bias, *grads[5:]), inputs, needed)
    ]


def _backward_splits(q: Tensor, k: Tensor, bias: Tensor | None, threads: int) -> int:
    """Key splits that give every thread work where heads are few; each costs one more copy of q's gradient."""
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


def _sink_gradient(sinks: Tensor | None, stats: Tensor, delta: Tensor) -> Tensor | None:
    """A sink's share of every row, ``exp(sink - top) / total``, takes ``-delta``."""
    if sinks is None:
        return None
    top, total, _ = stats.double()
    share = ((sinks.double()[:, None] - top).exp() / total).masked_fill_(total == 0, 0.0)
    return -(share * delta).sum((0, 2))


def _fake_backward(grad_out, out32, stats, *rest):
    return tiled.fake_gradients(rest[: tiled.DIFFERENTIABLE], rest[-1])


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[: tiled.DIFFERENTIABLE + 1], inputs[tiled.DIFFERENTIABLE + 1 :]
    out, out32, stats = output
    ctx.save_for_backward(out32 if out32.numel() else out, stats, *tensors)


def _differentiate(ctx, grad_out: Tensor, _grad_out32: Tensor, _grad_stats: Tensor):
    refuse_second_derivative("native")
    return _gradients(ctx, grad_out, _backward_op)


def _gradients(ctx, grad_out: Tensor, backward: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[: tiled.DIFFERENTIABLE])
    grads = backward(grad_out, *ctx.saved_tensors, *ctx.options, needed)
    absent = [None] * (1 + len(ctx.options))
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), *absent


class _Attention(torch.autograd.Function):
    """The training operator without the dispatcher, whose share of a short call is as large as the work itself."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _training(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivative("native")
        return _gradients(ctx, grad_out, _backward)


_inference_op = tiled.define_operator("native_attention", _inference, _fake_inference, "CPU")
_training_op = tiled.define_operator("native_attention_training", _training, _fake_training, "CPU")
_backward_op = tiled.define_operator("native_attention_backward", _backward, _fake_backward, "CPU")
torch.library.register_autograd(
    "hf_multimax::native_attention_training", _differentiate, setup_context=_save, lib=tiled.LIBRARY
)
