"""Every estimator on a toy language model, against exact sums over all it can say."""
