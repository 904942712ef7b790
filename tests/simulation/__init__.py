"""The deterministic world: seeded clocks, networks and faults."""
