"""Results on which the LLM2CLIP paper bases its claims. All values come from `published_results`."""

from __future__ import annotations

from llm2clip.published_results import CRA, CRA_NOTE, TABLES, PublishedTable


def describe_paper(claim: int) -> list[str]:
    """Return the paper's results for a claim as sentences, from the project pages of 2026 (AAAI-26) and 2024."""
    if claim == 1:
        return [_describe_caption_retrieval(), CRA_NOTE]
    if claim == 2:
        return [
            _describe_averages(
                "clip_text_encoders",
                "CLIP",
                "e5 (XLM-R)",
                "jina-v3-XLM-R",
                "LLM2Vec-Llama-3-8B",
                "Llama-3-8B-CC",
            ),
            _describe_averages("eva02_text_towers", "Llama3-8B", "Jina Bert", "Llama3-8B-TC", "Llama3-8B-CC"),
        ]
    if claim == 3:
        return [_describe_gains("clip_text_encoders", "Llama-3-8B-CC", "CLIP")]
    if claim == 4:
        return [
            _describe_chinese_retrieval("multilingual_retrieval", t2i=1),
            _describe_chinese_retrieval("chinese_retrieval", t2i=3),
        ]
    if claim == 5:
        return [
            _describe_averages(
                "clip_text_encoders", "Qwen2.5-0.5B-CC", "Llama-3.2-1B-CC", "Llama-3-8B-CC", "Llama-3.1-8B-CC"
            ),
            _describe_averages("eva02_text_towers", "Llama3.2-1B-CC", "Llama3-8B-CC", "Mistral-Nemo-12B-CC"),
        ]
    return ["The paper computes the LLM's embeddings once, before training (section 3.3)."]


def _describe_caption_retrieval() -> str:
    values = ", ".join(f"{model} {value}" for model, value in CRA.items())
    gains = [f"{CRA[f'{llm}-CC'] - CRA[llm]:.1f} points for {llm}" for llm in ("Llama3-8B", "Llama3.2-1B")]
    return f"Paper (2026), CRA on COCO: {values}. Tuning adds {' and '.join(gains)}."


def _describe_averages(table_name: str, *models: str) -> str:
    table = TABLES[table_name]
    values = [f"{model} {_join_cell(table, model, 'average')}" for model in models]
    return f"Paper ({table.year}), average R@1 over five benchmarks: {', '.join(values)}."


def _describe_gains(table_name: str, tuned: str, reference: str) -> str:
    """Return the gain of one encoder over another on each benchmark as a sentence, averaged over both directions."""
    table = TABLES[table_name]
    gains = []
    for column in table.columns:
        high, low = table.cell(tuned, column), table.cell(reference, column)
        if column != "average" and high and low:
            gains.append(f"{column} {sum(high) / 2 - sum(low) / 2:+.1f}")
    return f"Paper ({table.year}), gain of {tuned} over {reference}, mean of I2T and T2I R@1: {', '.join(gains)}."


def _describe_chinese_retrieval(table_name: str, t2i: int) -> str:
    """Return a sentence that states each model's T2I R@1 on Flickr30k-CN, stored at index `t2i` of each cell."""
    table = TABLES[table_name]
    values = []
    for model in table.rows:
        cell = table.cell(model, "Flickr30k-CN")
        if cell:
            values.append(f"{model} {cell[t2i]}")
    return f"Paper ({table.year}), T2I R@1 on Flickr30k-CN: {', '.join(values)}."


def _join_cell(table: PublishedTable, model: str, column: str) -> str:
    return " / ".join(map(str, table.cell(model, column) or ()))
