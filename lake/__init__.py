"""Delta tables and immutable objects on one store: layout, append-once, query."""
