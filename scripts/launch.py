"""``accelerate launch`` that ends with its program's exit code, which the launcher itself turns into 1.

python scripts/launch.py --config_file accelerate_config.yaml run_exp.py seed=1
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from accelerate.commands.launch import main as launch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_one.interruption import UNFINISHED


def common_code(codes: Iterable[int]) -> int:
    """One exit code for all processes: a failure, if there is one, before ``UNFINISHED``.

    Args:
        codes: Of the processes that did not end with 0; negative for the number of a signal.
    """
    seen = [code if code >= 0 else 128 - code for code in codes]
    return next((code for code in seen if code != UNFINISHED), UNFINISHED)


def main() -> int:
    """The command line, which is that of ``accelerate launch``."""
    try:
        launch()
    except ChildFailedError as failed:
        return common_code(failure.exitcode for failure in failed.failures.values())
    except SignalException as asked:  # the launcher has passed it on and waited
        return 128 + asked.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
