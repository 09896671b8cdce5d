"""`ptm prepare`: from raw text to a versioned data set, by pure stages that run on this machine (`local`) or on a cluster."""
