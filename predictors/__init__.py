"""Decides what is computed: the active sets that blocks accept."""
