"""The device's side: sensors, batcher, durable buffer and uplink."""
