"""All that depends on the architecture of the trained network: families, policy and reference, weights, sampling."""
