"""A whole cluster on one machine, made of network namespaces and real processes."""
