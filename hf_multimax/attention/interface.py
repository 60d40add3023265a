"""The one attention function: what every patched layer calls, and what users call without Transformers."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from hf_multimax.attention.call import make_call
from hf_multimax.attention.choose import choose_kernel, current_backend
from hf_multimax.attention.context import autocast_dtype, without_autocast
from hf_multimax.attention.eager import eager_attention, with_mask
from hf_multimax.attention.scaled import visible_keys, with_scaled_queries
from hf_multimax.attention.watched import attention_in_tiles, watched
from hf_multimax.functional import Affine, masked_softmax, modulate
from hf_multimax.normalizers.base import Normalizer, normalizers_by_row, on_its_device
from hf_multimax.rows.function import Rowwise

__all__ = ["IMPLEMENTATION", "attention_forward", "multimax_attention", "scaled_dot_product_multimax"]

#: The name under which attention is registered with Transformers.
IMPLEMENTATION = "multimax"
CONTINUOUS_BATCHING_REFUSED = (
    "continuous batching (generate_batch) prepares masks only for Transformers' own attention implementations: "
    "call generate() on a MultiMax model, or hf_multimax.unpatch_model(model) first"
)


class AttentionFeatures(TypedDict, total=False):
    """Further keywords of :func:`multimax_attention`."""

    bias: Tensor | None
    dropout_p: float
    scale: float | None
    affine: Affine | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def multimax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **features: Unpack[AttentionFeatures],
) -> Tensor:
    """``dropout(softmax(sigma(q k^T * scale + bias) + attn_mask)) v``: attention with MultiMax (paper, section 4).

    Args:
        q: ``[B, H, Nq, D]``, floating type; all of q, k and v are of one type. Under ``torch.autocast`` they are cast
            to its type, as scaled_dot_product_attention's are.
        k, v: ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``; H is a multiple of Hkv (grouped-query attention).
        ranges, ts: the modulator, ``[2N]`` or ``[H, 2N]``; see :func:`hf_multimax.modulate`.
        attn_mask: broadcastable to ``[B, H, Nq, Nk]``; boolean (True = keep), or additive: entries at or below half of
            ``finfo(attn_mask.dtype).min`` are masked, others are added after sigma.
        is_causal: query i sees keys up to i + Nk - Nq; combines with ``attn_mask``.
        bias: broadcastable to ``[B, H, Nq, Nk]``, added to the scaled scores before sigma; a gradient flows to it.
        dropout_p: probability of dropping an attention weight. It acts whenever it is above 0.
        scale: of the scores; None is ``D ** -0.5``.
        affine: ``(scale, shift)`` of the affine variant, each a scalar or ``[H]``.
        window: with ``is_causal`` the last ``window`` keys, itself included; without it keys at a distance below it.
            What it hides costs nothing: time and memory grow with Nq times ``window``.
        softcap: c in ``c * tanh(score / c)``, applied before the bias.
        sinks: ``[H]``, extra unmodulated logits that take a share of the weights and give nothing.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type. Rows that see no key give zeros.

    Raises:
        ValueError: for shapes that do not fit, ``is_causal`` or ``window`` with more queries than keys, or a
            probability outside [0, 1). TypeError: for a mask that is neither boolean nor floating.

    Examples:
        >>> import torch
        >>> from hf_multimax import multimax_attention
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8).unbind()  # batch 2, 4 heads, length 16, width 8
        >>> ranges, ts = torch.zeros(4), torch.zeros(4)
        >>> out = multimax_attention(q, k, v, ranges, ts, is_causal=True)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(out, expected, atol=1e-6)  # slopes of zero: SoftMax
        True
    """
    unknown = features.keys() - AttentionFeatures.__annotations__.keys()
    if unknown:
        known = ", ".join(("attn_mask", "is_causal", *AttentionFeatures.__annotations__))
        raise TypeError(f"multimax_attention has no argument {min(unknown)!r}; there are {known}")
    q, k, v, no_autocast = _as_autocast_wants(q, k, v)
    call = make_call(q, k, v, ranges, ts, mask=attn_mask, causal=is_causal, **features)
    with no_autocast:
        kernel = choose_kernel(call)
        if kernel is not None:
            return kernel.attention(call)
        affine = features.get("affine")
        return eager_attention(call, lambda scores: modulate(scores, ranges, ts, affine), masked_softmax)[0]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What Transformers' AttentionInterface calls: ``[B, H, Nq, D]`` in, ``[B, Nq, H, Dv]`` and the weights out.

    Scores pass scaling, soft-capping, position bias, the layer's normalizer (its elementwise part), the mask, and
    join the attention sinks, which stay unmodulated. As under SDPA, a mask of None means "causal" for a causal layer,
    except in models written for masks that are always there. Of the other keywords, those of :data:`_KEYWORDS` act;
    the rest (``sliding_window``, which the mask contains, packing hints for flash attention) needs nothing here.

    Raises:
        ValueError: if the layer was never patched, or a paged cache is given.
    """
    if not hasattr(module, "multimax"):
        raise ValueError(
            f"this {type(module).__name__} was told to use the attention implementation {IMPLEMENTATION!r} but was "
            "never patched, so it has no normalizer: load the checkpoint by its Auto class after `import hf_multimax`, "
            "or call hf_multimax.patch_model(model)"
        )
    if kwargs.get("cache") is not None:
        raise ValueError(CONTINUOUS_BATCHING_REFUSED)
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    is_causal = is_causal and not getattr(module, "_multimax_always_masked", False)
    weights_wanted, normalizers = _weights_wanted(module, kwargs), _normalizers(module, query.shape[0])
    window = _window(attention_mask, query, key)
    mask = _with_selected_keys(module, query, key, attention_mask, kwargs)
    features = {"scale": scaling, **{name: kwargs.get(given) for given, name in _KEYWORDS.items()}}
    features["sinks"] = features["sinks"] if kwargs.get("s_aux") is None else kwargs["s_aux"]
    if _stays_stock(module, normalizers, features) and not weights_wanted:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": features["bias"]}
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    causal = mask is None and query.shape[2] > 1 and bool(is_causal)
    if causal:
        # A static cache at its first call is longer than the queries, which are its first entries.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        features["bias"] = None if features["bias"] is None else features["bias"][..., : query.shape[2]]
    if query.shape[0] == 1:  # queries of the model's own, for every text
        query = query.expand(key.shape[0], -1, -1, -1)
    features |= {"mask": mask, "dropout_p": dropout if module.training else 0.0, "window": window}
    features["causal"] = causal or window is not None
    query, key, value, no_autocast = _as_autocast_wants(query, key, value)
    stock_is_eager = getattr(module, "_multimax_eager", False)
    parts = []
    with no_autocast:
        for normalizer, rows in normalizers:
            tensors = (query, key, value) if rows is None else (x[rows.to(x.device)] for x in (query, key, value))
            own = features if rows is None else {k: _rows_of(x, rows, query.shape[0]) for k, x in features.items()}
            with on_its_device(normalizer):
                parts.append(_attend(normalizer, tensors, own, weights_wanted, stock_is_eager))
    out, weights = parts[0] if len(parts) == 1 else _in_order(parts, [rows for _, rows in normalizers])
    return out.transpose(1, 2).contiguous(), weights


#: what models call the features of a call
_KEYWORDS = {"position_bias": "bias", "softcap": "softcap", "sinks": "sinks"}


def _stays_stock(
    module: nn.Module, normalizers: list[tuple[Normalizer | None, Tensor | None]], features: dict[str, Any]
) -> bool:
    """Whether a layer that the config leaves out, which shares its config with patched ones, computes as under SDPA."""
    stock = all(normalizer is None for normalizer, _ in normalizers) and current_backend() == "auto"
    plain = features["sinks"] is None and not features["softcap"]
    return stock and plain and not getattr(module, "_multimax_eager", False)


def _window(mask: Tensor | None, query: Tensor, key: Tensor) -> int | None:
    """The causal window outside which a mask of Transformers' hides everything, where its maker has noted one."""
    window = getattr(mask, "_multimax_window", None)
    return window if window is not None and query.shape[2] == key.shape[2] == mask.shape[-1] else None


def _in_order(parts: list[tuple[Tensor, Tensor | None]], rows: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The results of several normalizers, each row of the batch in its place."""
    order = torch.cat(rows).argsort().to(parts[0][0].device)
    out, weights = zip(*parts)
    # Where they are not wanted, some normalizers may give them all the same.
    return torch.cat(out)[order], None if any(w is None for w in weights) else torch.cat(weights)[order]


def _with_selected_keys(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask with the keys that a sparse layer's indexer selects, which such layers tell kernels of their own only.

    ``indices`` is ``[B, Nq, selected]``; of ``block_indices``, blocks of keys, the layer's indexer makes a mask.
    """
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    indices, blocks = kwargs.get("indices"), kwargs.get("block_indices")
    if indices is not None:
        keep = torch.zeros(batch, rows, keys, dtype=torch.bool, device=query.device)
        keep = keep.scatter(-1, indices.long(), True).unsqueeze(1)
        return with_mask(mask, keep)
    if blocks is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(keys - rows, keys, device=query.device)
        positions = (positions if positions.ndim > 1 else positions.unsqueeze(0)).expand(batch, -1)
        return module.indexer.build_block_mask(blocks, mask, keys, query.dtype, query.device, positions)
    return mask


def _normalizers(module: nn.Module, rows: int) -> list[tuple[Normalizer | None, Tensor | None]]:
    return [(None, None)] if module.multimax is None else normalizers_by_row(module.multimax, rows)


def _rows_of(x: Any, rows: Tensor, batch: int) -> Any:
    """The rows of a batch; what has none, or one for all, as it is."""
    return x if not isinstance(x, Tensor) or x.ndim < 4 or x.shape[0] != batch else x[rows.to(x.device)]


def scaled_dot_product_multimax(
    normalizer: Normalizer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` through a layer's normalizer.

    Args:
        query: ``[..., Nq, D]``, at least two dimensions; key, value: ``[..., Nk, D]`` and ``[..., Nk, Dv]``.
        attn_mask: boolean (True = keep) or additive, broadcastable to ``[..., Nq, Nk]``; it acts after the modulator.
        is_causal: query i sees the keys up to i, as there.
        bias: broadcastable to ``[..., Nq, Nk]``, added to the scores before the modulator.
        others: as there.

    Returns:
        ``[..., Nq, Dv]``.
    """
    query, key, value, no_autocast = _as_autocast_wants(query, key, value)
    lead, (rows, keys) = query.shape[:-2], (query.shape[-2], key.shape[-2])
    if is_causal and rows != keys:
        attn_mask = with_mask(attn_mask, torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril())
    if len(lead) != 2:
        attn_mask, bias = (
            None if x is None else x.expand(*lead, rows, keys).reshape(-1, *lead[-1:], rows, keys)
            for x in (attn_mask, bias)
        )
    q, k, v = (
        x if x.ndim == 4 else x.reshape(-1, *(x.shape[-3:-2] or (1,)), *x.shape[-2:]) for x in (query, key, value)
    )
    features = {"mask": attn_mask, "bias": bias, "dropout_p": dropout_p, "scale": scale}
    features["causal"] = is_causal and rows == keys
    with no_autocast:
        out, _ = _attend(normalizer, (q, k, v), features, False)
    return out.reshape(*lead, rows, value.shape[-1])


def _attend(
    normalizer: Normalizer | None,
    tensors: Iterable[Tensor],
    features: dict[str, Any],
    weights_wanted: bool,
    stock_is_eager: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention through a layer's normalizer, by the backend that the user chose or that suits the call.

    Args:
        tensors: q, k and v.
        features: those of :func:`hf_multimax.attention.call.make_call`.
        stock_is_eager: without a normalizer, compute what Transformers' eager attention does, bit for bit.
    """
    (q, k, v), factor = tensors, None
    modulator = None if normalizer is None else normalizer.modulator(q.device)
    if modulator is not None:
        ranges, ts, affine = modulator
        call = make_call(q, k, v, ranges, ts, affine=affine, **features)
        kernel = choose_kernel(call, weights=weights_wanted)
        if kernel is not None:
            return kernel.attention(call), None
    elif normalizer is not None:
        call = make_call(q, k, v, None, None, **features)
        name = getattr(normalizer, "name", type(normalizer).__name__)
        factor = normalizer.row_factor(q, partial(visible_keys, call))
        scaled = call if factor is None else with_scaled_queries(call, factor)
        if scaled is not None:
            rows = Rowwise(name, partial(_row_function, normalizer), normalizer.compiled())
            kernel = choose_kernel(scaled, weights=weights_wanted, other=rows)
            if kernel is not None:
                return kernel.rowwise_attention(rows, scaled).to(v.dtype), None
        elif current_backend() not in ("auto", "eager"):
            raise ValueError(
                f"backend({current_backend()!r}) does not support {name} with factors of the queries under a bias or "
                "soft-capping: use backend('auto') or backend('eager')"
            )
    else:  # SoftMax, which kernels know as the modulator of slopes 0
        zeros = torch.zeros(2, device=q.device)
        call = make_call(q, k, v, zeros, zeros, **features)
        kernel = None
        if current_backend() == "auto" and not stock_is_eager:
            kernel = choose_kernel(call, weights=weights_wanted)
        if kernel is not None:
            return kernel.attention(call), None
        return eager_attention(call, _identity, masked_softmax)
    if watched() and not weights_wanted:
        return attention_in_tiles(call, normalizer.modulate, normalizer.normalize, factor), None
    return eager_attention(call, normalizer.modulate, normalizer.normalize, factor)


def _row_function(normalizer: Normalizer) -> tuple[Callable[..., Tensor], tuple[nn.Parameter, ...]]:
    """A normalizer as a function of rows and of its own parameters, and these."""
    unhooked = _Unhooked(normalizer)
    names = [name for name, _ in unhooked.named_parameters()]

    def rows(scores: Tensor, keep: Tensor | None, *values: Tensor) -> Tensor:
        return torch.func.functional_call(unhooked, dict(zip(names, values)), (scores, -1, keep))

    return rows, tuple(unhooked.parameters())


def _as_autocast_wants(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
    """q, k and v in autocast's type where it is on, and a context without it for what is computed of them.

    Rotary models hand q and k in float32 and v in autocast's type; SDPA, which is on autocast's list, casts them.
    Inside, autocast would round what the kernels keep in float32.
    """
    dtype = autocast_dtype(q.device)
    if dtype is None:
        return q, k, v, contextlib.nullcontext()
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v, without_autocast(q.device)


class _Unhooked(nn.Module):
    """A normalizer without its hooks: those of FSDP2 would end its backward pass after the first tile."""

    def __init__(self, normalizer: Normalizer) -> None:
        super().__init__()
        self.normalizer = normalizer

    def forward(self, x: Tensor, dim: int, mask: Tensor | None) -> Tensor:
        return self.normalizer.normalize(self.normalizer.modulate(x), dim, mask)


def _weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller collects attention weights: by keyword, by config, or by Transformers' output capturing."""
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    collected = output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in key for key in collected)


def _identity(x: Tensor) -> Tensor:
    return x
