"""Where readings come from: the sensor port, the drivers of the agent, and the check of what they hand over.

Reading order: `port` (what a driver is), `columns` (what its values become), `registry` (how a driver is found by
name), then the drivers `host`, `replay`, `function`, `hwmon`, `iio`.
"""
