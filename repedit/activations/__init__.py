"""Forward loops over a corpus: statistics at sites, examples that activate neurons, next-token predictions."""
