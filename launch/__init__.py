"""The doors: the `dejavu` command and the embedded demo model."""

import os

# Before torch is imported, which reads it then: torch would print a page of every connection that ends. What
# there is to say of it, `dejavu.parallel.watchdog` and `dejavu.launch.ranks` say.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
