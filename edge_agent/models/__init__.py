"""Releases on a device: ordered, checked, tried and run; their predictions are a stream. See `docs/models-on-devices.md`.

Nothing here is imported, and neither onnxruntime nor numpy is loaded, where `agent.toml` has no `[models]`.
"""
