"""The networks: blocks, backbones, estimator, selector, and what they cost."""
