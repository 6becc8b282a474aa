"""Stand-in: an embedding with whole words dropped."""

from torch.nn import functional


def embedded_dropout(embed, words, dropout=0.1, scale=None):
    table = embed.weight
    if dropout:
        keep = table.data.new_empty(len(table), 1).bernoulli_(1 - dropout)
        table = keep.expand_as(table) / (1 - dropout) * table
    if scale:
        table = scale.expand_as(table) * table
    padding = -1 if embed.padding_idx is None else embed.padding_idx
    return functional.embedding(
        words, table, padding, embed.max_norm, embed.norm_type, embed.scale_grad_by_freq, embed.sparse
    )
