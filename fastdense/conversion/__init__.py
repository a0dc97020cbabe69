"""Other people's models: which of their modules are DenseNet blocks, and what these become and were."""
