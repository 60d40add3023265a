"""The one attention function: what every patched layer calls, and what users call without Transformers."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from hf_multimax.attention.choose import choose_kernel, current_backend, exporting, require_eager, tiles_are_slower
from hf_multimax.attention.context import autocast_dtype, differentiated_by_functions, without_autocast
from hf_multimax.attention.eager import eager_attention, with_causal, with_mask
from hf_multimax.attention.tiled import backend as tiled
from hf_multimax.functional import Affine, masked_softmax, modulate
from hf_multimax.normalizers.base import MultiMax, Normalizer, normalizers_by_row, on_its_device

__all__ = ["IMPLEMENTATION", "attention_forward", "multimax_attention", "scaled_dot_product_multimax"]

#: The name under which attention is registered with Transformers.
IMPLEMENTATION = "multimax"
CONTINUOUS_BATCHING_REFUSED = (
    "continuous batching (generate_batch) prepares masks only for Transformers' own attention implementations: "
    "call generate() on a MultiMax model, or hf_multimax.unpatch_model(model) first"
)


def multimax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    affine: Affine | None = None,
) -> Tensor:
    """``dropout(softmax(sigma(q k^T * scale + bias) + attn_mask)) v``: attention with MultiMax (paper, section 4).

    Args:
        q: ``[B, H, Nq, D]``, floating type; all of q, k and v are of one type. Under ``torch.autocast`` they are cast
            to its type, as scaled_dot_product_attention's are.
        k, v: ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``; H is a multiple of Hkv (grouped-query attention).
        ranges, ts: the modulator, ``[2N]`` or ``[H, 2N]``; see :func:`hf_multimax.modulate`.
        attn_mask: broadcastable to ``[B, H, Nq, Nk]``; boolean (True = keep), or additive: entries at or below half of
            ``finfo(attn_mask.dtype).min`` are masked, others are added after sigma.
        bias: broadcastable to ``[B, H, Nq, Nk]``, added to the scaled scores before sigma; a gradient flows to it.
        dropout_p: probability of dropping an attention weight. It acts whenever it is above 0.
        is_causal: query i sees keys up to i + Nk - Nq; combines with ``attn_mask``.
        scale: of the scores; None is ``D ** -0.5``.
        affine: ``(scale, shift)`` of the affine variant.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type. Rows that see no key give zeros.

    Raises:
        ValueError: for shapes that do not fit, ``is_causal`` with more queries than keys, or a probability outside
            [0, 1). TypeError: for a mask that is neither boolean nor floating.
    """
    q, k, v, no_autocast = _as_autocast_wants(q, k, v)
    tiled.check_arguments(q, k, v, ranges, ts, attn_mask, bias, affine, dropout_p, is_causal)
    features = {"mask": attn_mask, "bias": bias, "affine": affine, "dropout_p": dropout_p, "causal": is_causal}

    def modulator(scores: Tensor) -> Tensor:
        return modulate(scores, ranges, ts, affine)

    with no_autocast:
        kernel = choose_kernel(q, k, v, ranges, ts, scale=scale, **features)
        if kernel is not None:
            return kernel.attention(q, k, v, ranges, ts, scale=scale, **features)
        mask = with_causal(attn_mask, q, k) if is_causal else attn_mask
        options = {"mask": mask, "bias": bias, "dropout_p": dropout_p, "scale": scale}
        return eager_attention(q, k, v, modulator, masked_softmax, **options)[0]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What Transformers' AttentionInterface calls: ``[B, H, Nq, D]`` in, ``[B, Nq, H, Dv]`` and the weights out.

    Scores pass scaling, soft-capping, position bias, the layer's normalizer (its elementwise part), the mask, and
    join the attention sinks, which stay unmodulated. As under SDPA, a mask of None means "causal" for a causal layer,
    except in models written for masks that are always there.
    Other keywords (``sliding_window``, which the mask contains, packing hints for flash attention) need nothing here.

    Raises:
        ValueError: if the layer was never patched, or a paged cache is given.
    """
    if not hasattr(module, "multimax"):
        raise ValueError(
            f"this {type(module).__name__} was told to use the attention implementation {IMPLEMENTATION!r} but was "
            "never patched, so it has no normalizer: load the checkpoint by its Auto class after `import hf_multimax`, "
            "or call hf_multimax.patch_model(model)"
        )
    if cache is not None:
        raise ValueError(CONTINUOUS_BATCHING_REFUSED)
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    is_causal = is_causal and not getattr(module, "_multimax_always_masked", False)
    attention_mask = _with_selected_keys(module, query, key, attention_mask, kwargs)
    causal = attention_mask is None and query.shape[2] > 1 and bool(is_causal)
    weights_wanted = _weights_wanted(module, kwargs)
    sinks = s_aux if s_aux is not None else sinks
    normalizers = _normalizers(module, query.shape[0])
    # A layer that the config leaves out shares its config with patched ones and keeps the stock model's SoftMax.
    stock, eager = all(normalizer is None for normalizer, _ in normalizers), getattr(module, "_multimax_eager", False)
    if stock and not eager and current_backend() == "auto" and not weights_wanted and sinks is None and not softcap:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
        )
    if causal:
        # A static cache at its first call is longer than the queries, which are its first entries.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    if query.shape[0] == 1:  # queries of the model's own, for every text
        query = query.expand(key.shape[0], -1, -1, -1)
    query, key, value, no_autocast = _as_autocast_wants(query, key, value)
    options = {
        "dropout_p": dropout if module.training else 0.0,
        "causal": causal,
        "scale": scaling,
        "softcap": softcap,
        "sinks": sinks,
        "stock_is_eager": eager,
    }
    parts = []
    with no_autocast:
        for normalizer, rows in normalizers:
            tensors = (query, key, value, attention_mask, position_bias)
            q, k, v, mask, bias = tensors if rows is None else (_rows_of(x, rows, query.shape[0]) for x in tensors)
            with on_its_device(normalizer):
                parts.append((_attend(normalizer, q, k, v, weights_wanted, mask=mask, bias=bias, **options), rows))
    (out, weights), rows = parts[0]
    if rows is not None:
        order = torch.cat([rows for _, rows in parts]).argsort().to(query.device)
        out = torch.cat([out for (out, _), _ in parts])[order]
        weights = torch.cat([weights for (_, weights), _ in parts])[order] if weights_wanted else None
    return out.transpose(1, 2).contiguous(), weights


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
        return keep if mask is None else with_mask(mask, keep)
    if blocks is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(keys - rows, keys, device=query.device)
        positions = (positions if positions.ndim > 1 else positions.unsqueeze(0)).expand(batch, -1)
        return module.indexer.build_block_mask(blocks, mask, keys, query.dtype, query.device, positions)
    return mask


def _normalizers(module: nn.Module, rows: int) -> list[tuple[Normalizer | None, Tensor | None]]:
    return [(None, None)] if module.multimax is None else normalizers_by_row(module.multimax, rows)


def _rows_of(x: Tensor | None, rows: Tensor, batch: int) -> Tensor | None:
    """The rows of a batch; what has none, or one for all, as it is."""
    return x if x is None or x.ndim < 4 or x.shape[0] != batch else x[rows.to(x.device)]


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
        causal = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
        attn_mask = causal if attn_mask is None else with_mask(attn_mask, causal)
    if len(lead) != 2:
        attn_mask, bias = (
            None if x is None else x.expand(*lead, rows, keys).reshape(-1, *lead[-1:], rows, keys)
            for x in (attn_mask, bias)
        )
    q, k, v = (
        x if x.ndim == 4 else x.reshape(-1, *(x.shape[-3:-2] or (1,)), *x.shape[-2:]) for x in (query, key, value)
    )
    with no_autocast:
        out, _ = _attend(
            normalizer,
            q,
            k,
            v,
            False,
            mask=attn_mask,
            bias=bias,
            dropout_p=dropout_p,
            causal=is_causal and rows == keys,
            scale=scale,
            softcap=None,
            sinks=None,
        )
    return out.reshape(*lead, rows, value.shape[-1])


def _attend(
    normalizer: Normalizer | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights_wanted: bool,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    stock_is_eager: bool = False,
    **features: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention through a layer's normalizer, by the backend that the user chose or that suits the call.

    Args:
        stock_is_eager: without a normalizer, compute what Transformers' eager attention does, bit for bit.
    """
    sinks = features["sinks"]
    if sinks is not None and sinks.ndim > 1:  # one for each query: [B, H, Nq, 1]
        require_eager("attention sinks that differ from query to query")
    elif isinstance(normalizer, MultiMax) or (
        normalizer is None and current_backend() == "auto" and not stock_is_eager
    ):
        ranges, ts, features["affine"] = _scalars(normalizer, q)
        kernel = choose_kernel(q, k, v, ranges, ts, weights=weights_wanted, mask=mask, causal=causal, **features)
        if kernel is not None:
            return kernel.attention(q, k, v, ranges, ts, mask=mask, causal=causal, scale=scale, **features), None
        del features["affine"]
    elif normalizer is not None and _in_tiles(q, k, mask, features["sinks"], weights_wanted):
        unhooked = _Unhooked(normalizer)
        names, parameters = zip(*unhooked.named_parameters()) if list(unhooked.parameters()) else ((), ())
        del features["sinks"]

        def rows(scores: Tensor, keep: Tensor | None, *values: Tensor) -> Tensor:
            return torch.func.functional_call(unhooked, dict(zip(names, values)), (scores, -1, keep))

        return tiled.rowwise_attention(
            rows, parameters, q, k, v, mask=mask, causal=causal, scale=scale, **features
        ), None
    elif current_backend() not in ("auto", "eager") and normalizer is not None:
        raise ValueError(
            f"backend({current_backend()!r}) does not support {type(normalizer).__name__} in this call: "
            "use backend('auto') or backend('eager')"
        )
    return eager_attention(
        q,
        k,
        v,
        _identity if normalizer is None else normalizer.modulate,
        masked_softmax if normalizer is None else normalizer.normalize,
        mask=with_causal(mask, q, k) if causal else mask,
        scale=scale,
        **features,
    )


def _scalars(normalizer: MultiMax | None, q: Tensor) -> tuple[Tensor, Tensor, Affine | None]:
    """The modulator's parameters; without one those of SoftMax."""
    if normalizer is not None:
        return normalizer.ranges, normalizer.ts, normalizer.affine
    zeros = torch.zeros(2, device=q.device)
    return zeros, zeros, None


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

    def forward(self, *args: Any) -> Tensor:
        return self.normalizer.forward(*args)


def _in_tiles(q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, weights_wanted: bool) -> bool:
    """Whether a normalizer other than MultiMax runs in tiles, which bound the memory."""
    # a finite additive mask would have to come between the normalizer's two steps
    possible = not weights_wanted and sinks is None and (mask is None or mask.dtype == torch.bool)
    possible = possible and not differentiated_by_functions()
    if current_backend() == "tiled":
        return possible
    return possible and current_backend() == "auto" and not exporting() and not tiles_are_slower(q, k)


def _weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller collects attention weights: by keyword, by config, or by Transformers' output capturing."""
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    collected = output_capturing._active_collector.get()
    return bool(collected) and any("attentions" in key for key in collected)


def _identity(x: Tensor) -> Tensor:
    return x
