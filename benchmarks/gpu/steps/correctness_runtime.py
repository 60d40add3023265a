"""What PyTorch does with an operator on a GPU: graphs, a second device, the compiler."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.cases import Settings, Skipped
from hf_multimax import multimax_linear_cross_entropy
from hf_multimax.attention.triton import backend
from tests import cross_entropy_cases
from tests.attention_cases import Case as Call
from tests.attention_cases import check, run, through
from tests.triton_checks import assert_equal, compiles_as_one_graph

__all__ = ["checks"]

attention = through(backend)


def checks(settings: Settings) -> dict[str, Callable[[], object]]:
    """By name; each makes its tensors on PyTorch's default device."""
    causal = {"causal": True}
    graphs = {
        "tiles": Call("", (1, 4, 2, 130, 130), (64, 64), options=causal),
        "decode": Call("", (2, 4, 2, 1, 600), (64, 64)),
    }
    found: dict[str, Callable[[], object]] = {
        f"CUDA graph, {name}": lambda call=call: _graph(settings, call) for name, call in graphs.items()
    }
    found["CUDA graph, output loss"] = lambda: _graph_of_loss(settings)
    found["second device, attention"] = lambda: _second_device(settings, lambda: check(attention, graphs["tiles"]))
    found["second device, output loss"] = lambda: _second_device(
        settings, cross_entropy_cases.KERNEL_CHECKS["matches float64, everything"]
    )
    if settings.device == "cuda":
        found["compiled by inductor, attention"] = lambda: compiles_as_one_graph("inductor")
        found["compiled by inductor, output loss"] = _compiled_loss
    return found


def _graph(settings: Settings, call: Call) -> None:
    """A captured forward and backward pass, replayed with other inputs, gives what a plain call gives."""
    settings.require_gpu("CUDA graphs")
    tensors, options = call.build(torch.bfloat16)
    grad = torch.randn(*tensors["q"].shape[:3], call.dims[1]).bfloat16()
    fresh, _ = call.build(torch.bfloat16)
    assert_equal(_replayed(lambda: run(attention, tensors, options, grad), tensors, fresh),
                 run(attention, fresh, options, grad))  # fmt: skip


def _graph_of_loss(settings: Settings) -> None:
    settings.require_gpu("CUDA graphs")
    tensors, fresh = ({name: x.detach() for name, x in cross_entropy_cases.inputs(seed=seed)[0].items()}
                      for seed in (0, 1))  # fmt: skip
    labels = cross_entropy_cases.inputs()[1]

    def loss_and_gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        loss = cross_entropy_cases.fused(leaves, labels)
        return {"loss": loss.detach(), **cross_entropy_cases.gradients(loss, leaves)}

    assert_equal(_replayed(lambda: loss_and_gradients(tensors), tensors, fresh), loss_and_gradients(fresh))


def _replayed(
    function: Callable[[], dict[str, Tensor]], inputs: dict[str, Tensor], fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the captured ``function`` of ``inputs`` gives when it is replayed with ``fresh`` copied into them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    for name, x in inputs.items():
        x.copy_(fresh[name])
    graph.replay()
    return {name: x.clone() for name, x in found.items()}


def _second_device(settings: Settings, inner: Callable[[], object]) -> None:
    """Tensors on a device that is not the current one."""
    settings.require_gpu("several devices")
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU only")
    with torch.device("cuda:1"):
        inner()


def _compiled_loss() -> None:
    p, labels = cross_entropy_cases.inputs(tokens=64, vocab=301)

    def loss(hidden: Tensor, weight: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
        return multimax_linear_cross_entropy(hidden, weight, labels, ranges, ts)

    names = ("hidden", "weight", "ranges", "ts")
    tensors = [p[name] for name in names]
    found = [
        dict(zip(names, torch.autograd.grad(function(*tensors), tensors)))
        for function in (loss, torch.compile(loss, fullgraph=True))
    ]
    for name in names:
        torch.testing.assert_close(found[1][name], found[0][name])
