"""The files of ``conf/experiment``, composed outside a launch."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lora_one.config import ExperimentConfig, parse_config
from lora_one.errors import UserError
from lora_one.overrides import named_keys, normalise_overrides

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def compose_experiment(
    name: str, overrides: Sequence[str] = (), conf_dir: Path = CONF_DIR
) -> ExperimentConfig:
    """The configuration that ``python run_exp.py experiment=NAME OVERRIDES`` would run.

    Args:
        name: A file of ``conf/experiment``, and overrides behind it where a table's line has some:
            ``glue_t5/lora dataset=mnli``.
        overrides: As on the command line; they win over those of ``name``.
        conf_dir: The configuration folder.

    Raises:
        UserError: If there is no such file, or the overrides are wrong; the message names the experiment.
    """
    try:
        rewritten, _ = normalise_overrides(command_of(name, overrides), conf_dir)
        with initialize_config_dir(str(conf_dir), version_base="1.3"):
            return parse_config(compose("config", rewritten), named_keys(rewritten))
    except UserError as error:
        raise UserError(f"experiment {name}: {error}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"experiment {name}: {' '.join(str(error).split())}") from None


def command_of(name: str, overrides: Sequence[str] = ()) -> list[str]:
    """The arguments of ``run_exp.py`` that make an experiment: of two overrides of one key the later one."""
    file, *own = shlex.split(name)
    chosen: dict[str, str] = {}
    for override in (f"experiment={file}", *own, *overrides):
        chosen[override.lstrip("+").split("=", 1)[0]] = override
    return list(chosen.values())
