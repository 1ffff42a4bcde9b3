"""Evaluation: generation, graders, and results."""

import logging

# Installed on a machine without a GPU it complains as soon as PEFT imports it, before any program begins.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
