"""Attention that may have fewer heads than its width would hold, with the numerics of torch's own.

torch's `nn.MultiheadAttention` computes the width of a head as ``embed_dim / num_heads``, so it cannot lose one: the
heads that are left would be cut anew. Here that width is a number of its own.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from companion.errors import CompanionError


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) between ``embed_dim`` numbers in and as many out, of any heads.

    It is called as `nn.MultiheadAttention` is and its parameters have the same names: ``in_proj_weight``
    [3·heads·head_dim, embed_dim] (queries, keys, values one after the other), ``in_proj_bias``, ``out_proj``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.dropout, self.batch_first = dropout, batch_first
        inner = num_heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> "Attention":
        """The same attention, with the same parameters (the very objects, not copies).

        Raises:
            CompanionError: keys or values have a width of their own, or a bias row, which this class lacks.
        """
        if not replaceable(module):
            raise CompanionError(
                "attention with kdim, vdim, add_bias_kv or add_zero_attn cannot lose heads: exclude it."
            )
        with torch.device("meta"):  # no weights: they are put in below
            new = cls(
                module.embed_dim,
                module.num_heads,
                module.head_dim,
                bias=module.in_proj_bias is not None,
                dropout=module.dropout,
                batch_first=module.batch_first,
            )
        new.in_proj_weight, new.in_proj_bias = module.in_proj_weight, module.in_proj_bias
        new.out_proj.weight, new.out_proj.bias = module.out_proj.weight, module.out_proj.bias
        return new.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and answers of `nn.MultiheadAttention`; masks are bool (True: not attended to) or are added.

        Args:
            query: [N, L, embed_dim] with ``batch_first``, else [L, N, embed_dim]; unbatched [L, embed_dim] too.
            key: likewise, of S places.
            value: likewise, of S places.
            key_padding_mask: [N, S].
            need_weights: also return the attention weights.
            attn_mask: [L, S] or [N·heads, L, S]; with three dimensions it must fit the heads that are left.
            average_attn_weights: return their mean over the heads.
            is_causal: a hint that ``attn_mask`` is causal, as in torch; the mask itself is what counts.

        Returns:
            [N, L, embed_dim] and the weights [N, L, S] ([N, heads, L, S] if not averaged), or None for them.
        """
        single = query.dim() == 2
        inputs = [query, key, value]
        if single:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )  # each [N, heads, places, head_dim]
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        shares = None
        if need_weights:  # the fused operator does not give them
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            shares = (scores if mask is None else scores + mask).softmax(-1)
            shares = nn.functional.dropout(shares, dropout)
            out = shares @ v
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(1)
        if single:
            return out.squeeze(0), None if shares is None else shares.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), shares

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores [N, heads, L, S]."""
        found = None
        if attention is not None:
            found = _added(attention, q)
            if found.dim() == 3:
                found = found.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            more = _added(padding.reshape(-1, 1, 1, padding.shape[-1]), q)
            found = more if found is None else found + more
        return found

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.num_heads}, head_dim={self.head_dim}"


def replaceable(module: nn.MultiheadAttention) -> bool:
    """Whether `Attention` can do what this module does."""
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
