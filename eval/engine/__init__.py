"""Generation and scoring: what benchmarks ask a model, in batches."""
