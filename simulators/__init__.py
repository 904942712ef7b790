"""Recorded and synthetic sensors, swarms of light devices and the fault injector."""
