"""The protocol as other languages see it: the docstring and its test vectors."""
