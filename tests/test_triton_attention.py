"""The Triton backend. Its kernels run in the interpreter of Triton, in a process of their own, on small inputs, and on
a GPU where there is one; and they are compiled for sm_90, where the chosen tiles must not spill registers in a loop.

``TRITON_INTERPRET=1 pytest -o python_classes=Interpreted tests/test_triton_attention.py::Interpreted`` runs the first
part directly.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_multimax.attention import eager_attention
from hf_multimax.functional import masked_softmax, modulate
from hf_multimax.kernels.triton_attention import attention, unsupported, varlen_attention
from tests import extreme_scores
from tests.attention_cases import Case, check, reference, run
from tests.tolerances import RELATIVE, assert_draws_no_worse, assert_none_worse, relative_error

if importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CAUSAL = {"causal": True}
CASES = [
    Case("gqa causal per head", (1, 4, 2, 21, 37), per_head=True, options=CAUSAL),
    Case("order 1 affine", (1, 1, 1, 17, 17), order=1, affine=True),
    Case("order 3", (1, 1, 1, 17, 19), order=3, slope=0.3),
    Case("129 causal", (1, 1, 1, 65, 129), options=CAUSAL),
    Case("one key", (1, 2, 2, 1, 1), options=CAUSAL),
    Case("decode 129", (1, 2, 1, 1, 129), per_head=True, sinks=True),
    Case("few queries", (1, 4, 2, 3, 70), mask="padding", bias=(1, 4, 3, 70), options=CAUSAL),
    Case("odd dims", (1, 1, 1, 19, 35), (7, 13)),
    Case("wide", (1, 1, 1, 17, 17), (80, 136)),
    Case("boolean causal", (2, 1, 1, 17, 40), mask="boolean", options=CAUSAL),
    Case("padding", (2, 2, 1, 17, 33), mask="padding", bias=(33,)),
    Case("additive half", (2, 1, 1, 17, 17), mask="half"),
    Case("bias over batch", (2, 2, 2, 17, 17), bias=(1, 2, 17, 17), mask="additive"),
    Case("bias per query", (2, 2, 2, 17, 17), bias=(2, 1, 17, 1)),
    Case("sinks boolean", (1, 2, 2, 17, 17), sinks=True, mask="boolean"),
    Case("window", (1, 1, 1, 50, 70), options={"causal": True, "window": 9}),
    Case("window two-sided", (1, 1, 1, 50, 50), options={"window": 20}),
    Case(
        "all", (1, 4, 2, 17, 34), per_head=True, affine=True, sinks=True, mask="additive", bias=(1, 4, 17, 34),
        options={"causal": True, "window": 12, "softcap": 4.0},
    ),
    Case("large scores", (1, 1, 1, 17, 17), spread=20.0),
    Case("steep", (1, 1, 1, 17, 17), spread=20.0, slope=5.0, threshold=100.0),
]  # fmt: skip

_ONE_HEAD = (1, 1, 1, 33, 33)
HALF_CASES = [
    Case("ordinary", _ONE_HEAD),
    Case("large scores", _ONE_HEAD, spread=20.0),
    Case("slopes of 5", _ONE_HEAD, slope=5.0),
    Case("steep", _ONE_HEAD, spread=20.0, slope=5.0),
    Case("few queries", (1, 2, 1, 3, 70), spread=20.0, slope=5.0),
    Case("far thresholds", _ONE_HEAD, spread=20.0, slope=5.0, threshold=100.0),
]


def _exact_dot(self, a, b, accumulator, *options):
    """A product whose sums do not depend on the side an operand is on, as on tensor cores; NumPy's float32 sums do."""
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


class Interpreted:
    """Collected only in the interpreter's process, see :func:`test_in_the_interpreter`."""

    @pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
    def test_float32_agrees_with_float64(self, case):
        check(attention, case, draws=12)

    @pytest.mark.parametrize("seed", [3, 4, 8, 9, 12, 13, 14, 19, 26, 29, 32, 35])
    def test_scores_of_any_size(self, seed):
        extreme_scores.check(partial(extreme_scores.attention_weights, attention), seed)

    def test_far_thresholds(self):
        """Thresholds at 100: sums of terms of 1e4 that cancel, in the plain computation too."""
        tensors, _ = Case("", (1, 1, 1, 33, 33), slope=5.0, threshold=100.0, affine=True).build()
        grad = torch.randn(1, 1, 33, 16)
        actual, plain = (run(f, tensors, {}, grad) for f in (attention, reference))
        assert_none_worse(actual, plain, run(reference, {n: x.double() for n, x in tensors.items()}, {}, grad.double()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        """Weights and score gradients are rounded before the products; the interpreter truncates to bfloat16."""
        tensors, options = Case("", (1, 2, 1, 33, 33), sinks=True, options=CAUSAL).build(dtype)
        grad = torch.randn(1, 2, 33, 16).to(dtype)
        actual = run(attention, tensors, options, grad)
        exact = run(reference, {name: x.double() for name, x in tensors.items()}, options, grad.double())
        for name in ("out", "q", "k", "v"):
            assert actual[name].dtype == dtype
            assert relative_error(actual[name], exact[name]) < 4 * RELATIVE[dtype], name
        for name in ("ranges", "ts", "sinks"):  # these are not rounded, and the error of delta is taken out
            assert relative_error(actual[name], exact[name]) < 1e-4, name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("case", HALF_CASES, ids=lambda c: c.name)
    def test_half_precision_is_no_worse_than_the_eager_path(self, case, dtype, monkeypatch):
        """Where one weight of a row is nearly 1, its gradient is a difference of equals, magnified by the slope."""
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _exact_dot)

        def eager(q, k, v, ranges, ts):
            return eager_attention(q, k, v, lambda scores: modulate(scores, ranges, ts), masked_softmax)[0]

        errors: dict[str, tuple[list[float], list[float]]] = {}
        for _ in range(8):
            tensors, _ = case.build(dtype)
            grad = torch.randn(*tensors["q"].shape[:3], 16).to(dtype)
            exact = run(reference, {name: x.double() for name, x in tensors.items()}, {}, grad.double())
            for i, function in enumerate((attention, eager)):
                for name, found in run(function, tensors, {}, grad).items():
                    errors.setdefault(name, ([], []))[i].append(relative_error(found, exact[name]))
        for name, both in errors.items():
            assert_draws_no_worse(*both, f"{case.name}: {name}")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rows", [33, 2], ids=["tiles", "decode"])
    @pytest.mark.parametrize("sinks", [False, True])
    @pytest.mark.parametrize("ranges", [[-1e6, 1e30, -1e3, 1e3], [1e6, -1e6, -1.0, 1.0]], ids=["never", "always"])
    def test_thresholds_beyond_any_score_cost_half_precision_no_digits(self, ranges, sinks, rows, dtype):
        """Terms that never act, and linear ones that always act, which leaves a slope and, for sinks, a constant."""
        tensors, _ = Case("", (1, 1, 1, rows, 40), sinks=sinks).build(dtype)
        slope = 1e-6 if sinks else 0.5
        tensors |= {"ranges": torch.tensor(ranges), "ts": torch.tensor([slope, -2 * slope, 0.5, 0.5])}
        grad = torch.randn(1, 1, rows, 16).to(dtype)
        actual = run(attention, tensors, {}, grad)
        exact = run(reference, {name: x.double() for name, x in tensors.items()}, {}, grad.double())
        for name in ("out", "q", "k", "v", *(("sinks",) if sinks else ())):
            assert relative_error(actual[name], exact[name]) < 4 * RELATIVE[dtype], name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("name", ["ranges", "ts"])
    def test_a_parameter_that_is_no_number_shows(self, name, dtype):
        q, k, v = torch.randn(3, 1, 1, 17, 16).to(dtype)
        parameters = {"ranges": torch.randn(4), "ts": torch.rand(4)}
        parameters[name][1] = float("nan")
        assert attention(q, k, v, **parameters).isnan().all()

    def test_repeats_bit_by_bit(self):
        tensors, options = Case("", (1, 2, 1, 33, 40), bias=(1, 2, 33, 40), options=CAUSAL).build()
        first, second = (run(attention, tensors, options, torch.ones(1, 2, 33, 16)) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("shape", [(1, 2, 1, 33, 40), (1, 2, 1, 2, 40)], ids=["tiles", "decode"])
    def test_dropout_is_the_same_in_backward(self, shape):
        tensors, options = Case("", shape, (16, 40)).build()
        eye = {**tensors, "v": torch.eye(40)[None, None]}

        def dropped(*arguments, **more):
            torch.manual_seed(3)
            return attention(*arguments, **more, dropout_p=0.3)

        factors = dropped(*eye.values()) / reference(*eye.values())
        kept = factors > 0.5
        torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.7), rtol=1e-4, atol=0)
        assert 0.6 < kept.double().mean() < 0.8
        assert not torch.equal(kept[:, 0], kept[:, 1])
        grad = torch.randn(*shape[:2], shape[3], 40)
        actual = run(dropped, tensors, options, grad)
        doubles = {name: x.double() for name, x in tensors.items()}
        exact = run(reference, doubles, {"dropout": kept.double() / 0.7}, grad.double())
        assert all(relative_error(actual[name], exact[name]) < 1e-5 for name in actual)

    def test_sinks_of_any_strides(self):
        tensors, _ = Case("", (1, 2, 2, 17, 17)).build()
        inputs = [tensor.detach() for tensor in tensors.values()]
        wide = torch.randn(4)
        expected = attention(*inputs, sinks=wide[::2].clone())
        assert torch.equal(attention(*inputs, sinks=wide[::2]), expected)

    def test_nan_stays_in_its_row(self):
        tensors, _ = Case("", (1, 1, 1, 35, 20)).build()
        tensors["q"][0, 0, 5] = float("nan")
        found = run(attention, tensors, {}, torch.ones(1, 1, 35, 16))
        for name in ("out", "q"):
            assert found[name][0, 0, 5].isnan().all()
            assert found[name].isnan().any(-1).sum() == 1

    def test_score_of_minus_infinity_is_masked(self):
        tensors, _ = Case("", (1, 1, 1, 17, 18), affine=True, bias=(17, 18)).build()
        hidden = torch.rand(17, 18) < 0.4
        hidden[3] = True
        tensors["bias"][hidden] = float("-inf")
        grad = torch.randn(1, 1, 17, 16)
        actual = run(attention, tensors, {}, grad)
        exact = run(reference, {name: x.double() for name, x in tensors.items()}, {}, grad.double())
        assert all(relative_error(actual[name], exact[name]) < 5e-5 for name in actual)
        assert not actual["out"][0, 0, 3].any() and not actual["bias"][hidden].any()

    def test_any_strides(self):
        fused = torch.randn(2, 17, 3, 2, 16)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        k = k[:1].expand_as(k)
        ranges, ts = torch.randn(2, 4)
        expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), ranges, ts)
        assert torch.equal(attention(q, k, v, ranges, ts), expected)

    def test_gradients_only_where_asked(self):
        tensors, _ = Case("", (1, 1, 1, 17, 17)).build()
        full = run(attention, tensors, {}, torch.ones(1, 1, 17, 16))
        for wanted in (("q",), ("ts",), ("k", "ranges")):
            leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in tensors.items()}
            attention(*leaves.values()).sum().backward()
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in wanted)
                assert leaf.grad is None or torch.equal(leaf.grad, full[name])

    def test_scalars_of_each_head_in_float64(self):
        """Their gradients are rounded from one float64 buffer: here they must not share it."""
        tensors, _ = Case("", (1, 2, 2, 17, 17), per_head=True).build()
        doubles = {**tensors, "ranges": tensors["ranges"].double(), "ts": tensors["ts"].double()}
        single, double = (run(attention, x, {}, torch.ones(1, 2, 17, 16)) for x in (tensors, doubles))
        for name in ("ranges", "ts"):
            assert double[name].is_contiguous() and double[name].untyped_storage().nbytes() == 2 * 4 * 8
            assert torch.equal(double[name].float(), single[name])

    def test_no_keys_and_no_queries(self):
        ranges, ts = torch.randn(2, 4)
        for rows, keys in ((3, 0), (0, 3)):
            q = torch.randn(1, 2, rows, 16, requires_grad=True)
            out = attention(q, torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 8), ranges, ts)
            out.sum().backward()
            assert out.shape == (1, 2, rows, 8) and not out.any() and not q.grad.any()

    @pytest.mark.parametrize("features", [{}, {"causal": True, "window": 5, "softcap": 3.0}], ids=["plain", "banded"])
    def test_packed_sequences(self, features):
        lengths = [(5, 9), (0, 4), (33, 33), (1, 2)]
        cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in zip(*lengths))
        q, k, v = torch.randn(41, 4, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 8)
        tensors = {"q": q, "k": k, "v": v, "ranges": torch.randn(4, 4), "ts": torch.rand(4, 4)}
        grad = torch.randn(41, 4, 8)
        grad[39:] = 0  # tokens past the last sequence

        def packed(q, k, v, ranges, ts):
            return varlen_attention(q, k, v, ranges, ts, cu_q, cu_k, 33, 33, **features)

        def one_by_one(q, k, v, ranges, ts):
            rows, keys = q.split([*(a for a, _ in lengths), 2]), k.split([*(b for _, b in lengths), 2])
            values = v.split([*(b for _, b in lengths), 2])
            parts = [
                reference(*(x.transpose(0, 1)[None] for x in qkv), ranges, ts, **features)[0].transpose(0, 1)
                for qkv in list(zip(rows, keys, values))[:-1]
            ]
            return torch.cat((*parts, parts[0].new_zeros(2, 4, 8)))

        actual = run(packed, tensors, {}, grad)
        exact = run(one_by_one, {name: x.double() for name, x in tensors.items()}, {}, grad.double())
        assert not actual["out"][39:].any()
        assert all(relative_error(actual[name], exact[name]) < 1e-5 for name in actual)

    def test_operators(self):
        ranges, ts, scale, shift = torch.randn(2, 4), torch.rand(2, 4), torch.ones(2), torch.zeros(2)
        q, k, v = (torch.randn(1, 5, 2, 16).transpose(1, 2) for _ in range(3))
        bias, seed = torch.randn(1, 2, 5, 5), torch.tensor([7])
        tensors = [x.requires_grad_() for x in (q, k, v, ranges, ts, scale, shift)]
        arguments = (
            *tensors, None, torch.rand(5, 5) > 0.2, bias.requires_grad_(), seed, None, None, 5, 5,
            0.1, True, 4, 0.25, 2.0, True,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.hf_multimax.triton_attention.default, arguments)
        halves = [x.detach().half().requires_grad_() for x in (q, k, v)]  # with what rounding the output cut off
        torch.library.opcheck(
            torch.ops.hf_multimax.triton_attention.default, (*halves, *arguments[3:]), test_utils="test_faketensor"
        )

    def test_compiles_as_one_graph(self):
        tensors, options = Case("", (1, 2, 1, 17, 17), options=CAUSAL).build()
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        grad = torch.randn(1, 2, 17, 16)
        plain, traced = (run(f, tensors, options, grad) for f in (attention, compiled))
        assert all(torch.equal(plain[name], traced[name]) for name in plain)


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
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", "--no-header"]
    command += ["-o", "python_classes=Interpreted", f"{__file__}::Interpreted"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# --- compiling for sm_90 -----------------------------------------------------------------------------------------


def compile_for_hopper(width: int, dtype: str, features: str) -> None:
    """Compile what a call would launch and print of each kernel its name, the instructions of its first loop per score,
    and the accesses to spilled registers in all its loops.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        """As much of a driver as compilation asks for."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=0):
            return 0

    driver.set_active(Hopper())
    kernels = []
    launch = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **keywords):
        compiled = launch(self, *arguments, grid=grid, warmup=True, **keywords)
        threads = 32 * keywords.get("num_warps", 4)
        kernels.append((self.__name__, keywords.get("BLOCK_M", 1) * keywords.get("BLOCK_N", 1) / threads, compiled))

    JITFunction.run = compile_only
    from hf_multimax.kernels import triton_launch

    problem = _problem(triton_launch.Problem, width, getattr(torch, dtype), features)
    out = torch.empty_like(problem.q)
    norms = torch.empty(2 if dtype == "float32" else 1, *problem.q.shape[:3])
    residual = None if dtype == "float32" else out
    triton_launch.forward(problem, out, residual, norms)
    if features != "decode":
        needs = [True] * 5 + [problem.affine_scale is not None] * 2 + [False, problem.bias is not None]
        triton_launch.backward(problem, out, out, residual, norms, needs)
    for name, scores, kernel in kernels:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
            loops = _loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        spilled = sum(instruction.startswith(("LDL", "STL")) for loop in loops for instruction in loop)
        print(name, round(len(loops[0]) / scores, 1) if loops else 0, spilled)


def _loops(sass: str) -> list[list[str]]:
    """The instructions of the disassembled loops over tiles: between a branch backwards and its target, with exp2."""
    found = re.findall(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)(?: (0x[0-9a-f]+))?", sass)
    place = {int(address, 16): i for i, (address, _, _) in enumerate(found)}
    names = [name for _, name, _ in found]
    ends = [(place.get(int(target, 16), i), i) for i, (_, name, target) in enumerate(found) if name == "BRA" and target]
    return [names[start : end + 1] for start, end in ends if "MUFU.EX2" in names[start:end]]


def _problem(make, width: int, dtype: torch.dtype, features: str):
    """A call of training size with no features ("plain", "causal"), all of them ("all"), packed, or one query."""
    heads, rows, keys = 4, 1 if features == "decode" else 1024, 1024
    everything = features == "all"
    q = torch.empty(1, rows, heads, width, dtype=dtype).transpose(1, 2)
    k, v = (torch.empty(1, keys, 2 if everything else heads, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    scalars = torch.empty((heads, 4) if everything else 4)
    affine = torch.empty(heads) if everything else None
    cu = torch.empty(3, dtype=torch.int32) if features == "packed" else None
    return make(
        q, k, v, scalars, scalars, affine, affine,
        torch.empty(heads) if everything else None,
        torch.empty(1, 1, 1, keys, dtype=torch.bool) if everything else None,
        torch.empty(1, heads, rows, keys, dtype=dtype) if everything else None,
        torch.empty(1, dtype=torch.int64) if everything else None,
        cu, cu, rows, keys,
        0.1 if everything else 0.0,
        features != "plain",
        100 if everything else None,
        0.125,
        30.0 if everything else None,
    )  # fmt: skip


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
                (64, "bfloat16", "packed"),
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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
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


def _meta(rows: int = 5, keys: int = 7, **more):
    q, k, v = (torch.empty(2, 4, n, 16, device="meta", **more) for n in (rows, keys, keys))
    return q, k, v, torch.empty(4, device="meta"), torch.empty(4, device="meta")


def test_import_needs_no_triton():
    script = (
        "import sys; sys.modules['triton'] = None; "
        "import torch; from hf_multimax.kernels.triton_attention import unsupported; "
        "x = torch.empty(1, 1, 1, 1); print(unsupported(x, x, x, x, x))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "CPU tensors", done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused():
    tensors, _ = Case("").build()
    assert unsupported(*tensors.values()) == "CPU tensors"
    with pytest.raises(ValueError, match=r"does not support CPU tensors; use backend"):
        attention(*tensors.values())


def test_other_refusals():
    assert "float64" in unsupported(*_meta(dtype=torch.float64))
    q, k, v, ranges, ts = _meta()
    assert unsupported(q, k, v, ranges, ts) is None
    assert "different types" in unsupported(q, k.half(), v, ranges, ts)
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


def test_packed_mistakes_are_named():
    q = torch.empty(5, 4, 16, device="meta")
    cu = torch.empty(2, dtype=torch.int32, device="meta")
    scalars = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match="must be \\[tokens, heads, dim\\]"):
        varlen_attention(q[None], q, q, scalars, scalars, cu, cu, 5, 5)
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must both"):
        varlen_attention(q, q, q, scalars, scalars, cu, cu[:1], 5, 5)
    assert varlen_attention(q, q, q, scalars, scalars, cu, cu, 5, 5).shape == (5, 4, 16)
