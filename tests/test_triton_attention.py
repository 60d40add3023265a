"""The Triton backend. Its kernels run in the interpreter of Triton, in a process of their own, on small inputs, and on
a GPU where there is one; and they are compiled for sm_90, where the chosen tiles must not spill registers in a loop.

``TRITON_INTERPRET=1 pytest -o python_classes=Interpreted tests/test_triton_attention.py::Interpreted`` runs the first
part directly.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_multimax import backend, multimax_attention
from hf_multimax.attention.call import Call, make_call
from hf_multimax.attention.triton import backend as triton_backend
from tests.attention_cases import Case, through
from tests.triton_checks import CHECKS

ROOT = Path(__file__).parents[1]
attention = through(triton_backend)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Interpreted:
    """Collected only in the interpreter's process, see :func:`test_in_the_interpreter`."""

    @pytest.mark.parametrize("name", CHECKS)
    def test_check(self, name):
        CHECKS[name]()


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
class TestOnCuda(Interpreted):
    """The same tests of the compiled kernels."""

    @pytest.fixture(autouse=True)
    def _on_the_gpu(self):
        with torch.device("cuda"):
            yield


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    interpret(__file__)


def interpret(file: str) -> None:
    """Run the class ``Interpreted`` of a file of tests in a process of its own, in Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", "--no-header"]
    command += ["-o", "python_classes=Interpreted", f"{file}::Interpreted"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# --- compiling for sm_90 -----------------------------------------------------------------------------------------


def in_a_process(script: str, cache: Path) -> subprocess.CompletedProcess:
    """Run Python code in a process that compiles kernels, each anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def compile_for_hopper(width: int, dtype: str, features: str) -> None:
    """Compile what a call would launch and print of each kernel its name, the instructions of its first loop per score,
    and the accesses to spilled registers in all its loops.
    """
    from benchmarks.instructions import compiling_for_hopper
    from hf_multimax.attention.triton import launch as triton_launch

    call = _call(width, getattr(torch, dtype), features)
    out = torch.empty_like(call.q)
    norms = torch.empty(2 if dtype == "float32" else 1, *call.q.shape[:3])
    residual = None if dtype == "float32" else out
    with compiling_for_hopper() as launches:
        triton_launch.forward(call, out, residual, norms)
        if features != "decode":
            needed = [x is not None and name not in ("mask", "sinks") for name, x in zip(Call._fields, call)]
            triton_launch.backward(call, out, out, residual, norms, needed)
    for launch in launches:
        loops = launch.loops()
        print(launch.kernel, round(loops.per_score[0], 1) if loops.per_score else 0, loops.spilled)


def _call(width: int, dtype: torch.dtype, features: str) -> Call:
    """A call of training size with no features ("plain", "causal"), all of them ("all"), or one query."""
    heads, rows, keys = 4, 1 if features == "decode" else 1024, 1024
    everything = features == "all"
    q = torch.empty(1, rows, heads, width, dtype=dtype).transpose(1, 2)
    k, v = (torch.empty(1, keys, 2 if everything else heads, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    scalars = torch.empty((heads, 4) if everything else 4)
    call = make_call(q, k, v, scalars, scalars, causal=features != "plain", scale=0.125)
    if not everything:
        return call
    return call._replace(
        affine_scale=torch.empty(heads),
        affine_shift=torch.empty(heads),
        sinks=torch.empty(heads),
        mask=torch.empty(1, 1, 1, keys, dtype=torch.bool),
        bias=torch.empty(1, heads, rows, keys, dtype=dtype),
        seed=torch.empty(1, dtype=torch.int64),
        dropout_p=0.1,
        window=100,
        softcap=30.0,
    )


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("width", "dtype", "features"),
    [
        (64, "bfloat16", "causal"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                (64, "bfloat16", "plain"),
                (64, "float16", "all"),
                (64, "bfloat16", "decode"),
                (64, "float32", "causal"),
                (128, "bfloat16", "plain"),
                (128, "bfloat16", "causal"),
                (128, "bfloat16", "decode"),
                (256, "bfloat16", "causal"),
            ]
        ),
    ],
)
def test_compiles_for_sm_90_without_spills(width, dtype, features, tmp_path):
    script = f"from tests.test_triton_attention import *; compile_for_hopper({width}, {dtype!r}, {features!r})"
    done = in_a_process(script, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    expected = {"decode": 2, "all": 4}.get(features, 3)
    assert len(kernels) == expected, done.stdout
    if features in ("plain", "causal", "decode") and dtype != "float32":  # the others may spill a little
        assert all(int(spilled) == 0 for _, _, spilled in kernels), done.stdout
    if features == "plain":  # instructions per score, which bound the speed: no more than were counted, and 5 %
        counted = {64: (20.5, 29.8, 53.2), 128: (21.5, 32.0, 66.4)}[width]
        assert all(float(count) <= 1.05 * x for (_, count, _), x in zip(kernels, counted)), done.stdout


# --- without Triton and without a GPU ----------------------------------------------------------------------------


def unsupported(*tensors: torch.Tensor, **features: object) -> str | None:
    return triton_backend.unsupported(make_call(*tensors, **features))


def _meta(rows: int = 5, keys: int = 7, **more):
    q, k, v = (torch.empty(2, 4, n, 16, device="meta", **more) for n in (rows, keys, keys))
    return q, k, v, torch.empty(4, device="meta"), torch.empty(4, device="meta")


def test_import_needs_no_triton():
    script = (
        "import sys; sys.modules['triton'] = None; "
        "import torch; from hf_multimax.attention.triton.backend import unsupported; "
        "from hf_multimax.attention.call import make_call; "
        "x = torch.empty(1, 1, 1, 1); print(unsupported(make_call(x, x, x, torch.empty(2), torch.empty(2))))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "CPU tensors", done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused():
    tensors, _ = Case("").build()
    assert unsupported(*tensors.values()) == "CPU tensors"
    with backend("triton"), pytest.raises(ValueError, match=r"does not support CPU tensors: use backend"):
        multimax_attention(*tensors.values())


def test_other_refusals():
    assert "float64" in unsupported(*_meta(dtype=torch.float64))
    q, k, v, ranges, ts = _meta()
    assert unsupported(q, k, v, ranges, ts) is None
    mask = torch.empty(5, 7, device="meta", requires_grad=True)
    assert "gradient for the mask" in unsupported(q, k, v, ranges, ts, mask=mask)
    wide = torch.empty(1, 1, 1, 264, device="meta")
    assert "head dimensions above 256" in unsupported(wide, wide, wide, ranges, ts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True, "q": torch.empty(2, 4, 9, 16, device="meta")}, "9 queries, 7 keys"),
        ({"k": torch.empty(2, 3, 7, 16, device="meta")}, "H a multiple of Hkv"),
        ({"mask": torch.empty(3, 7, device="meta")}, "mask of shape"),
        ({"bias": torch.empty(5, 7, device="meta", dtype=torch.bool)}, "bias must be floating"),
        ({"ranges": torch.empty(3, 4, device="meta"), "ts": torch.empty(3, 4, device="meta")}, "3 heads, but q has 4"),
        ({"ts": torch.empty(2, device="meta")}, r"must both be \[2N\]"),
        ({"sinks": torch.empty(2, device="meta")}, r"sinks must be \[4\]"),
        ({"affine": (torch.empty(3, device="meta"), 0.0)}, "affine scale must be"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(zip(("q", "k", "v", "ranges", "ts"), _meta())) | change
    with pytest.raises((TypeError, ValueError), match=message):
        attention(**arguments)


def test_fake_tensors_need_no_gpu():
    q, k, v, ranges, ts = _meta()
    leaves = [x.requires_grad_() for x in (q, k, v, ranges, ts)]
    out = attention(*leaves, causal=True, dropout_p=0.1)
    assert out.shape == (2, 4, 5, 16) and out.transpose(1, 2).is_contiguous()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
