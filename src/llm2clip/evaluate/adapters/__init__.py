"""llm2clip models in the benchmark suites of other projects."""
