"""The device buffer: batches on disk until the lake has them."""
