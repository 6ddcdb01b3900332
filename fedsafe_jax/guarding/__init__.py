"""Guards around a model whose weights stay as they are: search under a budget, a guardian."""
