"""The doors: the `dejavu` command and the embedded demo model."""
