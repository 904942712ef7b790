"""Releases on a device: ordered, checked, tried, run; predictions are a stream. See `docs/models-on-devices.md`.

Nothing here is imported, and neither onnxruntime nor numpy is loaded, where `agent.toml` has no `[models]`.
"""
