"""Forward loops over a corpus: statistics of neurons, their most common values, next-token predictions."""
