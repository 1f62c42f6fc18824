"""What a pruning run needs and leaves: inputs, states between blocks, statistics, matrices, ranks, its report."""
