"""Train an emoji search engine with an LLM text tower on a small, real data set, and draw its search results."""
