"""Whose choice of a backend holds where: threads, tasks, generators, processes, backward passes, compiled code."""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from hf_multimax import backend, current_backend, multimax_attention
from hf_multimax.attention import choice as backend_choice
from hf_multimax.attention.native import backend as native

NAMES = ("eager", "tiled", "native")


def in_thread(function):
    """What ``function`` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_blocks_may_be_left_in_any_order(order):
    blocks = [backend(name) for name in NAMES]
    for block, name in zip(blocks, NAMES):
        block.__enter__()
        assert current_backend() == name
    still = list(NAMES)
    for i in order:
        blocks[i].__exit__(None, None, None)
        still.remove(NAMES[i])
        assert current_backend() == (still[-1] if still else "auto")


def test_a_block_that_fails_or_is_refused_leaves_nothing():
    with pytest.raises(KeyError), backend("eager"), backend("tiled"):
        raise KeyError
    with pytest.raises(ValueError, match="unknown backend 'flash'"), backend("flash"):
        pass
    assert current_backend() == "auto"


def test_threads_have_choices_of_their_own():
    barrier = threading.Barrier(2)
    seen = {}

    def work(name):
        with backend(name):
            barrier.wait()
            with backend("native"):
                barrier.wait()
            barrier.wait()  # both have left the inner block, in whatever order
            seen[name] = current_backend()
            barrier.wait()
        seen[name, "after"] = current_backend()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("eager", "tiled")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"eager": "eager", "tiled": "tiled", ("eager", "after"): "auto", ("tiled", "after"): "auto"}
    assert current_backend() == "auto"


def test_a_new_thread_begins_without_a_choice_unless_it_is_handed_one():
    with backend("eager"):
        assert in_thread(current_backend) == "auto"
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(current_backend)) == "eager"


def test_tasks_have_choices_of_their_own():
    async def work(name, steps):
        seen = []
        with contextlib.ExitStack() as stack:
            if name != "auto":
                stack.enter_context(backend(name))
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.append(current_backend())
        return seen

    async def together():
        with backend("eager"):
            inherits = asyncio.create_task(work("auto", 4))
        results = await asyncio.gather(work("tiled", 3), work("native", 5), work("auto", 4), inherits)
        return results, current_backend()

    results, after = asyncio.run(together())
    assert results == [["tiled"] * 3, ["native"] * 5, ["auto"] * 4, ["eager"] * 4]
    assert after == current_backend() == "auto"


def test_a_generator_holds_its_block_for_its_caller_until_it_ends():
    def steps(name):
        with backend(name):
            yield

    first, second = steps("eager"), steps("tiled")
    next(first), next(second)
    assert current_backend() == "tiled"
    first.close()
    assert current_backend() == "tiled"
    second.close()
    assert current_backend() == "auto"


def test_a_generator_that_is_closed_elsewhere_disturbs_nobody():
    def steps():
        with backend("eager"):
            yield

    def close(generator):
        with backend("tiled"):
            generator.close()
            return current_backend()

    context = contextvars.copy_context()  # nobody else goes on in it
    generator = steps()
    context.run(next, generator)
    assert in_thread(lambda: close(generator)) == "tiled"
    assert current_backend() == "auto"


class Chosen(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return NAMES.index(current_backend())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_begins_with_the_choice_of_the_thread_that_forked_it():
    with backend("tiled"):
        loader = DataLoader(Chosen(), num_workers=1, multiprocessing_context="fork")
        assert NAMES[next(iter(loader))] == "tiled"


class Nested(torch.autograd.Function):
    """A backward pass inside a backward pass, so deep that autograd goes on in threads of its own."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append((threading.get_ident(), current_backend()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.zeros(1, requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.seen).sum().backward()
        return grad, None, None


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_threads_of_autograd_see_the_choice_of_the_thread_that_calls_backward(name):
    seen = []
    with backend(name):
        Nested.apply(torch.zeros(1, requires_grad=True), 100, seen).sum().backward()
    threads, choices = zip(*seen)
    assert len(set(threads)) > 1 and set(choices) == {name}
    seen.clear()
    Nested.apply(torch.zeros(1, requires_grad=True), 100, seen).sum().backward()
    assert {choice for _, choice in seen} == {"auto"}


def test_what_is_handed_to_autograd_is_released_with_the_thread():
    made = []

    def work():
        for name in NAMES:
            with backend(name):
                made.append(weakref.ref(backend_choice._open.get()[-1]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert len(made) == len(NAMES) and not any(choice() for choice in made)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["eager", "tiled", "native"])
def test_checkpointing_recomputes_by_the_choice_around_the_backward_pass(name, use_reentrant):
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    tensors = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    scalars, seen = [torch.randn(4, requires_grad=True) for _ in range(2)], []

    def layer(q, k, v):
        seen.append(current_backend())
        return multimax_attention(q, k, v, *scalars, dropout_p=0.3)

    grads = []
    for run in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        for x in (*tensors, *scalars):
            x.grad = None
        with backend(name):
            run(*tensors).square().sum().backward()
        grads.append([x.grad for x in (*tensors, *scalars)])
    assert seen == [name] * 3
    for plain, again in zip(*grads):
        torch.testing.assert_close(again, plain)


class Operators:
    """A compiler that only notes which attention each graph holds."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, example):
        found = [name for name in ("tiled", "native") if f"hf_multimax.{name}_attention" in module.code]
        self.graphs.append(found or ["eager"])
        return module


def test_compiled_code_follows_the_choice_at_each_call():
    torch._dynamo.reset()
    tensors = [*(torch.randn(1, 2, 9, 8) for _ in range(3)), *(torch.randn(4) for _ in range(2))]
    compiler = Operators()
    compiled = torch.compile(multimax_attention, fullgraph=True, backend=compiler)
    names = ["eager", "tiled", *(["native"] if native.available() else [])]
    for _ in range(2):
        for name in names:
            with backend(name):
                compiled(*tensors)
    assert compiler.graphs == [[name] for name in names]
    with backend("tiled"):
        in_thread(lambda: compiled(*tensors))  # by "auto", of what it likes for a small call
        compiled(*tensors)
    assert compiler.graphs[len(names) :] in ([["native"]], [["eager"]])


def test_blocks_inside_of_compiled_code():
    torch._dynamo.reset()
    tensors = [*(torch.randn(1, 2, 9, 8) for _ in range(3)), *(torch.randn(4) for _ in range(2))]
    compiler = Operators()

    def call(*tensors):
        with backend("tiled"):
            with backend("eager"):
                name = current_backend()
            return multimax_attention(*tensors), name, current_backend()

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for outer in ("eager", "auto"):
        with backend(outer):
            out, inner, name = compiled(*tensors)
            assert (inner, name, current_backend()) == ("eager", "tiled", outer)
    assert {graph[0] for graph in compiler.graphs} == {"tiled"}
    with backend("eager"):
        torch.testing.assert_close(out, multimax_attention(*tensors))


def test_a_graph_break_inside_of_a_block_keeps_the_choice():
    torch._dynamo.reset()

    def call(x):
        with backend("tiled"):
            torch._dynamo.graph_break()
            return x + 1, current_backend()

    assert torch.compile(call, backend="eager")(torch.zeros(1))[1] == "tiled"
    assert current_backend() == "auto"
