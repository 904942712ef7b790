"""Who may say which release runs where: keys, the TUF repository in the lake, signed orders (docs/adr/0007)."""
