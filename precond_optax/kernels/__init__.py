"""Arrays in, arrays out: the numerical pieces, free of pytrees, Optax and step counts."""
