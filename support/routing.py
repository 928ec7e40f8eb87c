"""What a learned router does with its tokens: the "expert fluctuations" of section 4.4."""

from typing import Any

import torch
from torch import Tensor

from data import Example, collate
from support.runs import Ranks


def router_load(lora: list[dict], lengths: list[int]) -> Tensor:
    """How often a learned router chose each expert in the last pass, for rows of `lengths` tokens
    padded on the right: counts (B, n), means over layers and projections."""
    total, updates = 0, 0
    for layer in lora:
        for update in layer.values():
            chosen = (update.gates > 0).float()  # (B, T, n)
            rows = [row[:length].sum(0) for row, length in zip(chosen, lengths)]  # (n,) each
            total, updates = total + torch.stack(rows), updates + 1
    return total / updates


@torch.no_grad()
def router_shares(
    loss: Any, examples: list[Example], ranks: Ranks, batch_size: int
) -> dict[str, dict]:
    """Shares of the examples' tokens that a learned router gives each expert, by source and by
    target language: {"src_lang": {"de": [share of e0, ...]}, "tgt_lang": ...}."""
    model, adapter = loss.model, loss.adapter
    languages = adapter.languages
    n = len(languages)
    totals = torch.zeros(2, n, n, dtype=torch.float64)  # side, language, expert
    own = sorted(examples, key=lambda example: len(example.ids))[ranks.rank :: ranks.world]
    for start in range(0, len(own), batch_size):
        part = own[start : start + batch_size]
        src_langs, tgt_langs = [e.src_lang for e in part], [e.tgt_lang for e in part]
        tokens, _ = collate(part)  # (B, T)
        lora = adapter(src_langs, tgt_langs, model.dtype)
        model(tokens.to(model.device), lora)
        load_of_rows = router_load(lora, [len(e.ids) - 1 for e in part]).cpu()  # (B, n)
        for side, langs in enumerate((src_langs, tgt_langs)):
            for lang, row in zip(langs, load_of_rows):
                totals[side, languages.index(lang)] += row
    totals = ranks.sum(totals, model.device)
    shares = totals / totals.sum(-1, keepdim=True).clamp(min=1e-9)
    report = {}
    for side, of_side in zip(("src_lang", "tgt_lang"), shares.tolist()):
        report[side] = {}
        for lang, row in zip(languages, of_side):
            report[side][lang] = [round(share, 4) for share in row]
    return report
