"""What every normalizer costs against SoftMax, and how many exact zeros it gives on the same trained scores.

    python -m benchmarks.normalizers [--device cuda] [--threads 1] [--budget 1] [--full]

Times are of a batch of rows of length 64 to 8,192, float32, forward and forward + backward, as ratios to
``torch.softmax`` measured in turn with it; so are those of plain PyTorch, at one length, and of the ``entmax`` package,
where it has the function. The zeros are counted on the scores of a small byte-level GPT-2, trained
with SoftMax on the Python documentation that every interpreter carries, under its causal mask.
"""

import argparse
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import entmax
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import paired_timing, write_results
from benchmarks.tables import table
from hf_multimax import backend, normalize, patch_model, register_normalizer

LENGTHS = (64, 256, 1024, 8192)
#: where plain PyTorch is timed, too
PLAIN_LENGTH = 1024
#: name -> options; what is not named runs with its defaults.
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "multimax": ("multimax", {}),
    "softmax": ("softmax", {}),
    "sparsemax": ("sparsemax", {}),
    "entmax15": ("entmax15", {}),
    "entmax, alpha 1.25": ("entmax", {"alpha": 1.25}),
    "entmax, alpha learned": ("entmax", {"alpha": torch.tensor(1.25)}),
    "fusedmax": ("fusedmax", {}),
    "oscarmax": ("oscarmax", {}),
    "rsoftmax, 0.5": ("rsoftmax", {}),
    "tsoftmax, t 4": ("tsoftmax", {"t": 4.0}),
    "adaptive_temperature": ("adaptive_temperature", {}),
    "evsoftmax": ("evsoftmax", {}),
    "topk_softmax, k 32": ("topk_softmax", {"k": 32}),
    "scalable_softmax": ("scalable_softmax", {}),
    "asentmax": ("asentmax", {}),
    "softpick": ("softpick", {}),
    "softmax1": ("softmax1", {}),
    "sigmoid": ("sigmoid", {}),
}
#: the same in the entmax package
PACKAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "sparsemax": lambda x: entmax.sparsemax(x, dim=-1),
    "entmax15": lambda x: entmax.entmax15(x, dim=-1),
    "entmax, alpha 1.25": lambda x: entmax.entmax_bisect(x, alpha=1.25, dim=-1),
    "entmax, alpha learned": lambda x: entmax.entmax_bisect(x, alpha=torch.tensor(1.25, requires_grad=True), dim=-1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per normalizer, length and direction")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--full", action="store_true", help="2^22 scores per call instead of 2^18")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the model whose scores are used")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = 2**22 if arguments.full else 2**18
    zeros, spread = exact_zeros(arguments.steps)
    rows = []
    for label, (name, options) in CANDIDATES.items():
        row: dict[str, object] = {"normalizer": label}
        for n in LENGTHS:
            row.update(timings(label, name, options, size // n, n, arguments.device, arguments.budget))
        row["zeros %"] = 100 * zeros[label]
        rows.append(row)
        print(table([row]), flush=True)
    path = write_results(
        "normalizers", rows, device=arguments.device, scores_per_call=size, training_steps=arguments.steps, std=spread
    )
    print(
        f"\n{table(rows)}\n\nRatios to torch.softmax, {size} scores per call; scores of standard deviation {spread:.2f}"
    )
    print(f"for the zeros, {arguments.steps} steps of training. Written to {path.name}.")


def timings(
    label: str, name: str, options: dict[str, Any], rows: int, n: int, device: str, budget_s: float
) -> dict[str, float]:
    """Ratios to ``torch.softmax`` of one normalizer at one length, and of what else computes it."""
    torch.manual_seed(0)
    x = (3 * torch.randn(rows, n)).to(device)
    grad = torch.randn(rows, n).to(device)
    if name == "multimax":
        options = {key: torch.full((4,), 0.1, device=device, requires_grad=True) for key in ("ranges", "ts")}

    if label == "entmax, alpha learned":
        options = {"alpha": options["alpha"].to(device).requires_grad_()}

    def own(scores: Tensor) -> Tensor:
        return normalize(name, scores, **options)

    def softmax(scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def plain(scores: Tensor) -> Tensor:
        with backend("eager"):
            return own(scores)

    functions = {"own": own, "softmax": softmax}
    if label in PACKAGE:
        functions["package"] = PACKAGE[label]
    if n == PLAIN_LENGTH:
        functions["plain"] = plain
    result = {}
    for suffix, wrap in (("fwd", _forward), ("fwd+bwd", _backward)):
        candidates = {key: wrap(function, x, grad) for key, function in functions.items()}
        timed = paired_timing(candidates, device=device, budget_s=budget_s, min_rounds=3, warmup=1)
        result[f"{n} {suffix}"] = timed["own"].ratio(timed["softmax"])
        result[f"{n} {suffix} ms"] = 1e3 * timed["own"].median
        for other in ("package", "plain"):
            if other in timed:
                result[f"{n} {suffix} {other}"] = timed[other].ratio(timed["softmax"])
    return result


def _forward(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            function(x)

    return run


def _backward(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        function(leaf).backward(grad)

    return run


def exact_zeros(steps: int, n: int = 128) -> tuple[dict[str, float], float]:
    """The share of exact zeros among the visible entries of each normalizer, and the scores' standard deviation."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.long)
    scores, keep = trained_scores(text, steps, n)
    result = {}
    for label, (name, options) in CANDIDATES.items():
        p = normalize(name, scores, mask=keep, **options)
        result[label] = (p[keep] == 0).float().mean().item()
    return result, scores[keep].std().item()


def trained_scores(text: Tensor, steps: int, n: int) -> tuple[Tensor, Tensor]:
    """Scores ``[layers, heads, n, n]`` of a byte-level GPT-2 trained with SoftMax, and which entries are visible."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=n, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    held_out = text[-n:][None]
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 2 * n, (8,))
        batch = torch.stack([text[start : start + n] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen: list[tuple[Tensor, Tensor]] = []

    def record(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
        seen.append((x, keep))
        return normalize("softmax", x, dim, mask)

    register_normalizer("recorded_softmax", record)
    patch_model(model.eval(), normalizer="recorded_softmax")
    with torch.no_grad():
        model(held_out)
    return torch.cat([x for x, _ in seen]), torch.cat([keep for _, keep in seen])


if __name__ == "__main__":
    main()
