"""fairseq's language and translation models, as BioGPT, M2M100 and Marian."""

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_multimax.convert.layouts import (
    OUTPUT,
    Names,
    Weights,
    check_activation,
    check_counts,
    convert,
    depth_of,
    refuse,
    restore,
    shape_of,
)

#: fairseq's dictionaries begin with these; positions are counted from the one after ``<pad>``.
_BOS, _PAD, _EOS = 0, 1, 2
_TOKENS = {"bos_token_id": _BOS, "pad_token_id": _PAD, "eos_token_id": _EOS}

_FAIRSEQ_REFUSED = {
    r"adaptive_softmax\.": "an adaptive softmax is no single output layer; train with a plain one",
    r"\.embed_tokens\.embeddings\.": "adaptive inputs are no single embedding; train with a plain one",
    r"\.embed_out$": "an old name of output_projection.weight: load and save the checkpoint with a newer fairseq",
    r"\.layernorm_embedding\.": "the Transformers model has no norm after its embedding",
    r"\.project_(in|out)_dim\.": "the Transformers model has embeddings of the layers' width",
    r"\.bias_[kv]$": "the Transformers model has no extra key and value (add_bias_kv)",
    r"\.in_proj_(weight|bias)$": "an old name of the projections: load and save the checkpoint with a newer fairseq",
    r"\.(attn_ln|ffn_layernorm)\.|\.(c_attn|w_resid)$": "the Transformers model has no such scaling (NormFormer)",
}

_LAYER = ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def _layer_names(names: Names, theirs: str, ours: str, depth: int, cross: bool = False) -> None:
    """Add a stack of fairseq's layers, whose parts Transformers calls the same."""
    attention = ("self_attn", "encoder_attn") if cross else ("self_attn",)
    parts = [*_LAYER, *(f"{module}.{part}" for module in attention for part in _ATTENTION)]
    parts += ["encoder_attn_layer_norm"] if cross else []
    for i in range(depth):
        names.modules |= {f"{theirs}.layers.{i}.{part}": f"{ours}.layers.{i}.{part}" for part in parts}
        for module in attention:
            names.modulators[f"{theirs}.layers.{i}.{module}"] = f"{ours}.layers.{i}.{module}.multimax"


def _sinusoid(positions: int, width: int, dtype: torch.dtype) -> Tensor:
    """fairseq's table of positions, ``[positions + 2, width]``: the first is in row 2, that of padding is zero."""
    frequencies = torch.exp(torch.arange(width // 2, dtype=torch.float32) * (-math.log(10000) / (width // 2 - 1)))
    angles = torch.arange(positions + _PAD + 1, dtype=torch.float32)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    table[_PAD] = 0
    return table.to(dtype)


def _is_sinusoid(table: Tensor) -> bool:
    expected = _sinusoid(table.shape[0] - _PAD - 1, table.shape[1], table.dtype).to(table.device)
    last_bit = torch.finfo(torch.float32).eps * len(table)  # another machine's exp may differ in it, times the position
    return torch.allclose(table, expected, rtol=0, atol=last_bit + torch.finfo(table.dtype).eps)


def _take_constants(weights: Weights, stack: str) -> None:
    """Remove what is the same in every checkpoint."""
    version = weights.pop(f"{stack}.version", None)
    if f"{stack}.layer_norm.weight" in weights and (version is None or version.flatten()[0] <= 2):
        raise ValueError(
            f"'{stack}.version' is missing or below 3: fairseq ignores '{stack}.layer_norm' of so old a checkpoint; "
            "load and save it with a newer fairseq"
        )
    weights.pop(f"{stack}.embed_positions._float_tensor", None)


def _constants(stack: str, like: Tensor) -> Weights:
    return {f"{stack}.version": like.new_full((1,), 3), f"{stack}.embed_positions._float_tensor": like.new_zeros(1)}


def _take_output(weights: Weights) -> Tensor:
    """The output layer's weight, which a file may leave out where it is the embedding's."""
    return weights.pop("decoder.output_projection.weight", weights["decoder.embed_tokens.weight"])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _lm_names(depth: int) -> Names:
    names = Names(
        {"decoder.layer_norm": "biogpt.layer_norm"},
        {"decoder.embed_tokens.weight": "biogpt.embed_tokens.weight"},
        {"decoder": OUTPUT},
    )
    _layer_names(names, "decoder", "biogpt", depth)
    return names


_LM_POSITIONS = "biogpt.embed_positions.weight"


def read_lm(
    weights: Weights,
    *,
    num_heads: int,
    max_positions: int | None = None,
    activation: str = "relu",
    scale_embedding: bool = True,
    dropout: float = 0.0,
) -> PreTrainedModel:
    check_counts(num_heads=num_heads, **({} if max_positions is None else {"max_positions": max_positions}))
    check_activation(activation)
    refuse(weights, _FAIRSEQ_REFUSED)
    if "decoder.layer_norm.weight" not in weights:
        raise ValueError(
            "the checkpoint has no 'decoder.layer_norm.weight': Transformers has no decoder with fairseq's embedding "
            "and norms after the layers, or without a final one"
        )
    vocabulary, width = shape_of(weights, "decoder.embed_tokens.weight", 2)
    depth = depth_of(weights, "decoder.layers")
    _take_constants(weights, "decoder")
    positions = weights.pop("decoder.embed_positions.weight", None)
    learned = positions is not None
    if learned and max_positions is not None:
        raise ValueError("'decoder.embed_positions.weight' holds learned positions: leave max_positions out")
    if not learned and max_positions is None:
        raise ValueError(
            "the checkpoint has no 'decoder.embed_positions.weight', so its positions are sinusoidal: give their "
            "number as max_positions"
        )
    if not learned:
        positions = _sinusoid(max_positions, width, weights["decoder.embed_tokens.weight"].dtype)
    output = _take_output(weights)
    config = transformers.BioGptConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=shape_of(weights, "decoder.layers.0.fc1.weight", 2)[0],
        hidden_act=activation,
        max_position_embeddings=positions.shape[0] - _PAD - 1,
        scale_embedding=scale_embedding,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=_same(output, weights["decoder.embed_tokens.weight"]),
        **_TOKENS,
    )
    made = {_LM_POSITIONS: positions, "output_projection.weight": output}
    model = convert(weights, transformers.BioGptForCausalLM, config, _lm_names(depth), made)
    model.biogpt.embed_positions.requires_grad_(learned)
    return model


def write_lm(model: PreTrainedModel, ours: Weights) -> Weights:
    positions = ours.pop(_LM_POSITIONS)
    made = {"decoder.output_projection.weight": ours.pop("output_projection.weight")}
    made |= _constants("decoder", positions)
    if not _is_sinusoid(positions):
        del made["decoder.embed_positions._float_tensor"]
        made["decoder.embed_positions.weight"] = positions
    return restore(ours, _lm_names(model.config.num_hidden_layers), made)


_STACKS = ("encoder", "decoder")


def _translation_names(depths: tuple[int, int], final_norm: bool) -> Names:
    names = Names(modulators={"decoder": OUTPUT})
    for stack, depth in zip(_STACKS, depths, strict=True):
        if final_norm:
            names.modules[f"{stack}.layer_norm"] = f"model.{stack}.layer_norm"
        names.tensors[f"{stack}.embed_tokens.weight"] = f"model.{stack}.embed_tokens.weight"
        _layer_names(names, stack, f"model.{stack}", depth, cross=stack == "decoder")
    names.tensors["decoder.output_projection.weight"] = "lm_head.weight"
    return names


def read_translation(
    weights: Weights,
    *,
    num_heads: int | tuple[int, int],
    max_positions: int = 1024,
    activation: str = "relu",
    scale_embedding: bool = True,
    dropout: float = 0.0,
) -> PreTrainedModel:
    heads = (num_heads, num_heads) if isinstance(num_heads, int) else num_heads
    check_counts(encoder_heads=heads[0], decoder_heads=heads[1], max_positions=max_positions)
    check_activation(activation)
    refuse(weights, _FAIRSEQ_REFUSED)
    refuse(weights, {r"\.embed_positions\.weight$": "the Transformers models have sinusoidal positions"})
    pre_norm = _is_pre_norm(weights)
    for stack in _STACKS:
        _take_constants(weights, stack)
    output = weights["decoder.output_projection.weight"] = _take_output(weights)
    tied = _same(output, weights["decoder.embed_tokens.weight"])
    shared = tied and _same(output, weights["encoder.embed_tokens.weight"])
    if pre_norm and not shared:
        raise ValueError(
            "'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight' and 'decoder.output_projection.weight' "
            "differ: M2M100, the pre-norm model, has one embedding for all (--share-all-embeddings)"
        )
    settings = {
        "d_model": shape_of(weights, "encoder.embed_tokens.weight", 2)[1],
        "max_position_embeddings": max_positions,
        "activation_function": activation,
        "scale_embedding": scale_embedding,
        "dropout": dropout,
        "attention_dropout": 0.0,
        "decoder_start_token_id": _EOS,
        "tie_word_embeddings": tied,
        **_TOKENS,
        **_depths_and_widths(weights, heads),
    }
    names = _translation_names(tuple(settings[f"{stack}_layers"] for stack in _STACKS), pre_norm)
    made = {"model.shared.weight": weights["encoder.embed_tokens.weight"]} if shared else {}
    if not pre_norm:
        return _marian(weights, settings, names, made)
    source, _ = shape_of(weights, "encoder.embed_tokens.weight", 2)
    config = transformers.M2M100Config(vocab_size=source, **settings)
    return convert(weights, transformers.M2M100ForConditionalGeneration, config, names, made)


def _is_pre_norm(weights: Weights) -> bool:
    """Whether the norms of both stacks come before their layers, which leaves one at each end."""
    final_norms = {f"{stack}.layer_norm.weight" in weights for stack in _STACKS}
    if len(final_norms) > 1:
        raise ValueError(
            "only one of 'encoder.layer_norm.weight' and 'decoder.layer_norm.weight' is there: Transformers has no "
            "model whose encoder and decoder have their norms in different places"
        )
    return final_norms.pop()


def _depths_and_widths(weights: Weights, heads: tuple[int, int]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for stack, count in zip(_STACKS, heads, strict=True):
        depth = depth_of(weights, f"{stack}.layers")
        settings |= {f"{stack}_layers": depth, f"{stack}_attention_heads": count, f"{stack}_layerdrop": 0.0}
        settings[f"{stack}_ffn_dim"] = shape_of(weights, f"{stack}.layers.0.fc1.weight", 2)[0]
    return settings


def _marian(weights: Weights, settings: dict[str, Any], names: Names, made: Weights) -> PreTrainedModel:
    """The post-norm model, which has a table of positions and a bias of the logits."""
    output, width = weights["decoder.output_projection.weight"], settings["d_model"]
    (source, _), (target, _) = (shape_of(weights, f"{stack}.embed_tokens.weight", 2) for stack in _STACKS)
    config = transformers.MarianConfig(
        vocab_size=source,
        decoder_vocab_size=target,
        share_encoder_decoder_embeddings=bool(made),
        forced_eos_token_id=None,
        **settings,
    )
    table = _sinusoid(settings["max_position_embeddings"], width, output.dtype)[_PAD + 1 :]
    made |= {f"model.{stack}.embed_positions.weight": table for stack in _STACKS}
    made["final_logits_bias"] = output.new_zeros(1, target)
    model = convert(weights, transformers.MarianMTModel, config, names, made)
    model._keys_to_ignore_on_save = set()  # Marian would compute its own positions on loading
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.requires_grad_(False)
    return model


def write_translation(model: PreTrainedModel, ours: Weights) -> Weights:
    made: Weights = {}
    for stack in _STACKS:
        made |= _constants(stack, ours["lm_head.weight"])
        table = ours.pop(f"model.{stack}.embed_positions.weight", None)  # M2M100 has fairseq's own, and keeps no tensor
        if table is not None and not _is_sinusoid(torch.cat([_sinusoid(0, table.shape[1], table.dtype), table])):
            raise ValueError(f"'model.{stack}.embed_positions.weight' does not hold fairseq's sinusoidal positions")
    if ours.pop("final_logits_bias", torch.zeros(1)).any():
        raise ValueError("'final_logits_bias' is not zero: fairseq's output layer has no bias")
    ours.pop("model.shared.weight", None)  # the embeddings are copies of it
    config = model.config
    names = _translation_names((config.encoder_layers, config.decoder_layers), config.model_type == "m2m_100")
    return restore(ours, names, made)
