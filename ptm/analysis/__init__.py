"""What a model looks at, what its hidden states hold, and what it prefers: attention maps, probes, bias suites, and pictures of them.

Measured on one model that is not changed. All figures are on the host, in float64, from arrays without padding.
"""
