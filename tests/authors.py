"""The models of the authors' checkpoints in plain PyTorch, written from the formulas: what converted models must equal.

Their parameters have the names and shapes of those checkpoints, so that ``state_dict()`` is one. Nothing here uses the
package or Transformers.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu


def sigma(x: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
    """x + sum over n of t_bn max(b_n - x, 0)^n + t_dn max(x - d_n, 0)^n."""
    result = x
    for n in range(1, len(ranges) // 2 + 1):
        b, d, t_b, t_d = ranges[2 * n - 2], ranges[2 * n - 1], ts[2 * n - 2], ts[2 * n - 1]
        result = result + t_b * (b - x).clamp(min=0) ** n + t_d * (x - d).clamp(min=0) ** n
    return result


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, ranges: Tensor, ts: Tensor, hidden: Tensor | None) -> Tensor:
    """``[batch, length, width]`` each; ``hidden`` is True where a query must not see a key."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = sigma(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), ranges, ts)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Modulated(nn.Module):
    """Something with a modulator; the values are large enough to tell a wrong place or order."""

    def __init__(self, order: int = 2) -> None:
        super().__init__()
        self.ranges = nn.Parameter(0.5 * torch.randn(2 * order))
        self.ts = nn.Parameter(0.2 * torch.randn(2 * order))


def randomize(model: nn.Module) -> nn.Module:
    """Every bias, norm and class token away from what initialisation makes of it, and evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# -- timm's vision transformer, as the authors changed it --------------------------------------------------------------


class ViTAttention(Modulated):
    def __init__(self, width: int, heads: int, bias: bool, order: int) -> None:
        super().__init__(order)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, -1), self.heads, self.ranges, self.ts, None))


class Perceptron(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, eps: float, bias: bool, order: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = ViTAttention(width, heads, bias, order)
        self.mlp = Perceptron(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(Modulated):
    """``[batch, channels, 16, 16]`` to logits: patches without a class token, norm, mean, head, sigma."""

    def __init__(self, heads: int = 4, eps: float = 1e-6, qkv_bias: bool = False, order: int = 2) -> None:
        super().__init__(order)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(2, 32, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 32))
        self.blocks = nn.ModuleList(Block(32, heads, 48, eps, qkv_bias, order) for _ in range(2))
        self.norm = nn.LayerNorm(32, eps)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return sigma(self.head(self.norm(x).mean(1)), self.ranges, self.ts)


# -- fairseq, as the authors changed it --------------------------------------------------------------------------------

PAD = 1


def position_numbers(tokens: Tensor) -> Tensor:
    """2, 3, ... for what is no padding, and 1 for padding."""
    kept = (tokens != PAD).long()
    return kept.cumsum(1) * kept + PAD


class Sinusoidal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("_float_tensor", torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        numbers = position_numbers(tokens)
        rates = torch.tensor([10000 ** (-k / (self.width // 2 - 1)) for k in range(self.width // 2)])
        angles = numbers[..., None].float() * rates
        table = torch.cat([angles.sin(), angles.cos()], -1).to(self._float_tensor)
        return table * (numbers != PAD)[..., None]


class Learned(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(position_numbers(tokens))


class FairseqAttention(Modulated):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        return self.out_proj(attend(q, k, v, self.heads, self.ranges, self.ts, hidden))


class FairseqLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, pre_norm: bool, cross: bool) -> None:
        super().__init__()
        self.pre_norm, self.cross = pre_norm, cross
        self.self_attn, self.self_attn_layer_norm = FairseqAttention(width, heads), nn.LayerNorm(width)
        if cross:
            self.encoder_attn, self.encoder_attn_layer_norm = FairseqAttention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, hidden: Tensor, memory: Tensor | None, hidden_memory: Tensor | None) -> Tensor:
        x = self.residual(x, self.self_attn_layer_norm, lambda y: self.self_attn(y, y, hidden))
        if self.cross:
            x = self.residual(x, self.encoder_attn_layer_norm, lambda y: self.encoder_attn(y, memory, hidden_memory))
        return self.residual(x, self.final_layer_norm, lambda y: self.fc2(relu(self.fc1(y))))

    def residual(self, x, norm, function) -> Tensor:
        return x + function(norm(x)) if self.pre_norm else norm(x + function(x))


class Stack(nn.Module):
    """An encoder or decoder, without an output layer."""

    def __init__(
        self, vocabulary: int, pre_norm: bool, cross: bool, causal: bool, learned: int | None, scaled: bool = True
    ) -> None:
        super().__init__()
        width = 32
        self.causal, self.scale = causal, math.sqrt(width) if scaled else 1.0
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens = nn.Embedding(vocabulary, width, PAD)
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)
        self.embed_positions = Learned(learned + PAD + 1, width, PAD) if learned else Sinusoidal(width)
        self.layers = nn.ModuleList(FairseqLayer(width, 4, 48, pre_norm, cross) for _ in range(2))
        self.layer_norm = nn.LayerNorm(width) if pre_norm else None

    def forward(self, tokens: Tensor, memory: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        x = self.scale * self.embed_tokens(tokens) + self.embed_positions(tokens)
        hidden = (tokens == PAD)[:, None, None, :]
        if self.causal:
            hidden = hidden | torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        hidden_memory = None if source is None else (source == PAD)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, hidden, memory, hidden_memory)
        return x if self.layer_norm is None else self.layer_norm(x)


class Decoder(Stack):
    """A stack with an output layer, whose logits are modulated."""

    def __init__(self, vocabulary: int, pre_norm: bool, cross: bool, learned: int | None, tied: bool, scaled=True):
        super().__init__(vocabulary, pre_norm, cross, True, learned, scaled)
        self.output_projection = nn.Linear(32, vocabulary, bias=False)
        if tied:
            self.output_projection.weight = self.embed_tokens.weight
        self.ranges = nn.Parameter(0.5 * torch.randn(4))
        self.ts = nn.Parameter(0.2 * torch.randn(4))

    def forward(self, tokens: Tensor, memory: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        return sigma(self.output_projection(super().forward(tokens, memory, source)), self.ranges, self.ts)


class LanguageModel(nn.Module):
    """fairseq's ``transformer_lm``: tokens ``[batch, length]`` to logits."""

    def __init__(self, learned: int | None = None, tied: bool = True, scaled: bool = True) -> None:
        super().__init__()
        self.decoder = Decoder(23, True, False, learned, tied, scaled)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens)


class Translator(nn.Module):
    """fairseq's ``transformer``: source and previous target tokens to logits.

    Args:
        embeddings: "shared" by encoder, decoder and output, "tied" in the decoder only, or "separate".
    """

    def __init__(self, pre_norm: bool = False, embeddings: str = "tied", learned: int | None = None) -> None:
        super().__init__()
        shared = embeddings == "shared"
        self.encoder = Stack(23 if shared else 19, pre_norm, False, False, learned)
        self.decoder = Decoder(23, pre_norm, True, learned, embeddings != "separate")
        if shared:
            self.encoder.embed_tokens = self.decoder.embed_tokens

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, self.encoder(source), source)
