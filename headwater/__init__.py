"""The roof: the command line and the one-machine stack."""
