"""Parts of a pruning run: inputs, states between blocks, statistics, matrices, ranks, the report."""
