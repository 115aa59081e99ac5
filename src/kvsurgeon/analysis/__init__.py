"""Token axes, attention sites and cache points of a decoder."""
