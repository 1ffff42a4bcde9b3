"""What libraries say about themselves is no news of a run."""

import logging
import warnings

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quieten_libraries() -> None:
    """Errors of libraries are still said; their advice to programmers and their bars are not."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT 0.21 asks transformers 5 by a name that will go.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    # PEFT 0.21 reads its own AdaLoRA file with a warning about its own keys.
    warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
