"""The way of models in `headwater demo`: train, sign, roll out, watch, and learn again when a device drifts."""
