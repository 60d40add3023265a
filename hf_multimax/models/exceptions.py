"""What discovery cannot find out about Transformers' architectures, and nothing else."""

#: Keywords that attention layers pass to the attention interface and that the attention function acts on, or that
#: another part of the call already contains (the mask holds the sliding window).
HANDLED_KEYWORDS = frozenset(
    {"query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "position_bias", "softcap", "s_aux"}
    | {"sinks", "sliding_window", "cache", "indices", "block_indices"}
)

#: Keywords that only other implementations need: packing hints for flash attention, whose masks say the same, and
#: requests that the caller of the layer answers.
IRRELEVANT_KEYWORDS = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "deterministic"}
    | {"output_attentions"}
)

#: Where attention layers, or else their config, keep the number of query heads.
HEAD_COUNT_ATTRIBUTES = ("num_heads", "n_heads", "num_attention_heads", "n_head")

#: Where attention layers keep the width of a query.
QUERY_WIDTH_ATTRIBUTES = (
    "qk_head_dim",
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
    "dim_head",
)

#: Attention that is not called so.
ATTENTION_BY_NAME = frozenset({"MgpstrA3Module"})

#: Attention that computes nothing where the inputs that it looks at are absent.
MAY_REST = frozenset({"EvollaSequenceAlignerCrossAttention"})

#: Attention outside the interface whose result the class computes but does not use.
UNUSED_ATTENTION = {"SiglipForImageClassification": frozenset({"vision_model.head.attention"})}

#: Attention, by what its class's name says in small letters, whose softmax is over something else than keys.
UNSERVED_ATTENTION = {
    "deformable": "its softmax weighs sampling points, not keys",
    "attentionmap": "its softmax makes a map of positions of all heads together",
    "gated": "its softmax gates features",
    "attnblock": "its softmax is over the third of four dimensions",
    "assignattention": "its softmax assigns keys to groups",
    "grucell": "its softmax is over the second dimension",
}
