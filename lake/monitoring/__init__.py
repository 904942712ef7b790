"""Watching models at work: drift against the training reference, performance, accuracy by late labels, triggers."""
