"""Triton attention through functions of rows: in the interpreter, in a process of its own, on a GPU where there is one,
and compiled for sm_90, where the chosen tiles must not spill registers.

``TRITON_INTERPRET=1 pytest -o python_classes=Interpreted tests/test_triton_row_attention.py::Interpreted`` runs the
first part directly.
"""

import pytest
import torch

from hf_multimax.attention import choose
from hf_multimax.attention.call import make_call
from hf_multimax.attention.triton import backend as triton_backend
from hf_multimax.normalizers.registry import get_normalizer
from hf_multimax.rows.function import Rowwise
from tests.test_triton_attention import INTERPRETED, in_a_process, interpret, needs_triton
from tests.triton_row_attention_checks import CHECKS


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


def compile_for_hopper(name: str, width: int, dtype: str, keys: int) -> None:
    """Compile what a causal call would launch and print of each kernel its name and its spilled registers."""
    from benchmarks.instructions import compiling_for_hopper
    from hf_multimax.attention.rowwise import function_of
    from hf_multimax.attention.triton.rows import launch

    q, k, v = (torch.empty(1, keys, 4, width, dtype=getattr(torch, dtype)).transpose(1, 2) for _ in range(3))
    call = make_call(q, k, v, None, None, causal=True, scale=0.125)
    function, out = function_of(rowwise(name), call), torch.empty_like(q)
    stats = torch.empty(6, *q.shape[:3])
    with compiling_for_hopper() as launches:
        launch.forward(function, call, out, stats)
        launch.backward(function, call, out, stats, (False, False, False))
    for launched in launches:
        print(launched.kernel, launched.compiled.metadata.shared, launched.spilled())


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("name", "width", "dtype", "keys"),
    [
        ("entmax15", 64, "bfloat16", 1024),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                ("sparsemax", 64, "float16", 8192),
                ("entmax15", 128, "bfloat16", 2048),
                ("entmax15", 256, "bfloat16", 1024),
                ("entmax15", 64, "float32", 1024),
                ("scalable_softmax", 64, "bfloat16", 1024),
            ]
        ),
    ],
)
def test_compiles_for_sm_90_without_spills(name, width, dtype, keys, tmp_path):
    call = f"compile_for_hopper({name!r}, {width}, {dtype!r}, {keys})"
    done = in_a_process(f"from tests.test_triton_row_attention import *; {call}", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert [kernel for kernel, *_ in kernels] == ["rows_forward_kernel", "rows_dq_kernel", "rows_dkdv_kernel"]
    assert all(int(shared) <= 227 << 10 and int(spilled) == 0 for _, shared, spilled in kernels), done.stdout


def rowwise(name: str, **options) -> Rowwise:
    function = get_normalizer(name).function
    options = {**get_normalizer(name).complete(options)}
    options = {key: x for key, x in options.items() if key in function.__signature__.parameters}
    return Rowwise(name, lambda: None, function.compiled(**options))


def meta(**features):
    q, k, v = (torch.empty(2, 4, n, 16, device="meta") for n in (5, 7, 7))
    return make_call(q, k, v, None, None, **features)


def test_what_is_not_supported_is_named():
    unsupported = triton_backend.rowwise_unsupported
    assert unsupported(rowwise("sparsemax"), meta()) is None
    assert unsupported(rowwise("fusedmax"), meta()) == "fusedmax"
    assert unsupported(Rowwise("own", lambda: None), meta()) == "own"
    assert unsupported(rowwise("entmax", alpha=2.5), meta()) == "entmax with an alpha above 2"
    assert unsupported(rowwise("entmax", alpha=1.5), meta()) is None
    assert unsupported(rowwise("sparsemax"), meta(sinks=torch.empty(4, device="meta"))) == "attention sinks"
    mask = torch.empty(5, 7, device="meta", requires_grad=True)
    assert unsupported(rowwise("sparsemax"), meta(mask=mask)) == "a gradient for the mask"
    assert "float64" in unsupported(
        rowwise("sparsemax"), meta()._replace(q=torch.empty(2, 4, 5, 16, device="meta").double())
    )


def test_auto_takes_it_on_cuda(monkeypatch):
    monkeypatch.setitem(choose._PREFERRED, "meta", triton_backend)
    assert choose.choose_kernel(meta(), other=rowwise("entmax15")) is triton_backend
    assert choose.choose_kernel(meta(), other=rowwise("fusedmax")) is not triton_backend
