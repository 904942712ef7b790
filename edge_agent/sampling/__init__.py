"""Which readings are taken, and which of them are kept.

The cores are pure: `on_change` (report by exception), `burst` (trigger with history), `compare` (exact thresholds).
`loop` runs one sensor step by step, clock and sink handed in; `runner` gives it a thread; `queue` is a bounded sink.
"""
