"""The Triton functions of rows: in Triton's interpreter, in a process of their own, on a GPU where there is one, and
compiled for sm_90, where no register may be spilled.

``TRITON_INTERPRET=1 pytest -o python_classes=Interpreted tests/test_triton_rows.py::Interpreted`` runs the first part
directly.
"""

import pytest
import torch

from hf_multimax.rows.triton.arguments import KINDS
from tests.test_triton_attention import INTERPRETED, in_a_process, interpret, needs_triton
from tests.triton_row_checks import CHECKS, LARGE


class Interpreted:
    """Collected only in the interpreter's process, see :func:`test_in_the_interpreter`."""

    @pytest.mark.parametrize("name", CHECKS)
    def test_check(self, name):
        CHECKS[name]()


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
class TestOnCuda(Interpreted):
    """The same tests of the compiled kernels, and larger ones."""

    @pytest.fixture(autouse=True)
    def _on_the_gpu(self):
        with torch.device("cuda"):
            yield

    @pytest.mark.parametrize("name", LARGE)
    def test_large(self, name):
        LARGE[name]()


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    interpret(__file__)


def compile_for_hopper(kinds: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    """Compile what calls with every gradient would launch, and print of each kernel how many accesses there are to
    spilled registers.
    """
    from benchmarks.instructions import compiling_for_hopper
    from hf_multimax.rows.call import KINDS as ALL
    from hf_multimax.rows.call import RowCall
    from hf_multimax.rows.triton import launch

    with compiling_for_hopper() as launches:
        for kind in kinds:
            for n, dtype in zip(lengths, (torch.float32, torch.bfloat16, torch.float16)):
                x, p, value = torch.empty(64, n, dtype=dtype), torch.empty(64, n), torch.empty(64)
                options = {"value": value} if kind in ("entmax", "rsoftmax", "scalable_softmax", "asentmax") else {}
                options |= {"beta": value, "gamma": value} if kind == "asentmax" else {}
                options |= dict.fromkeys(("ranges", "ts"), torch.empty(4)) if kind == "multimax" else {}
                mask = torch.empty(1, n, dtype=torch.bool).expand(64, n)
                call = RowCall(x, **options, mask=mask, kind=ALL.index(kind), a=1.3)
                stats = torch.empty(64, 6)
                launch.forward(call, torch.empty_like(x), p, stats)
                needed = [True, *(field is not None for field in call[1:6]), False]
                launch.backward(torch.empty_like(x), p, stats, call._replace(mask=None), needed)
                for launched in launches[-2:]:
                    print(kind, n, launched.kernel, launched.spilled())


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    ("kinds", "lengths"),
    [
        (("multimax", "asentmax"), (1024,)),
        pytest.param(KINDS, (1024, 4096), marks=pytest.mark.slow),
        pytest.param(KINDS, (32768, 2048, 8192), marks=pytest.mark.slow),
    ],
)
def test_compiles_for_sm_90_without_spills(kinds, lengths, tmp_path):
    script = f"from tests.test_triton_rows import *; compile_for_hopper({kinds!r}, {lengths!r})"
    done = in_a_process(script, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 2 * len(kinds) * len(lengths), done.stdout
    assert all(int(spilled) == 0 for *_, spilled in kernels), done.stdout


def test_without_triton_plain_pytorch_computes(tmp_path):
    script = (
        "import sys; sys.modules['triton'] = None; import torch; from hf_multimax import backend, normalize; "
        "from hf_multimax.rows import choose\n"
        "x = torch.tensor([0.0, 9.0])\n"
        "with backend('triton'): print(normalize('entmax15', x).tolist(), choose._kernel('entmax15', x))"
    )
    done = in_a_process(script, tmp_path)
    assert done.stdout.strip() == "[0.0, 1.0] None", done.stderr[-2000:]
