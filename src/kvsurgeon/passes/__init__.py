"""Passes: one file each, a frozen dataclass whose fields are its options. Nothing is imported until it is used."""
