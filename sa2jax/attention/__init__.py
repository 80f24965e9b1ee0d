"""Attention: its mask, its back ends (a file each) and the choice between them (`dispatch`)."""
