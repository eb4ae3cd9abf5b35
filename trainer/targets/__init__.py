"""From a sample to what its positions should predict: ask, align, fuse, ahead of the step."""
