"""Train an emoji search engine with an LLM text tower on a small but real data set, and draw search results."""
