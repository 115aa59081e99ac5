"""Passes: one file each, a frozen dataclass whose fields are its options. A pass is imported when it is used."""
