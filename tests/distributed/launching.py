"""What ``accelerate launch`` makes of a config of the recipes, without launching anything."""

import argparse
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
COMMAND = ("-m", "recipes.language_modeling", "recipes/configs/lm_web_small.yaml")
_ENVIRONMENTS = {
    "simple_launcher": lambda arguments: prepare_simple_launcher_cmd_env(arguments)[1],
    "multi_gpu_launcher": prepare_multi_gpu_env,
    "deepspeed_launcher": lambda arguments: prepare_deepspeed_cmd_env(arguments)[1],
}


def launch(name: str, *more: str) -> tuple[str, argparse.Namespace, dict[str, str]]:
    """The launcher that ``recipes/accelerate/{name}.yaml`` asks for, its arguments, and each process's environment."""
    # a free port, for the launchers look whether the usual one is taken
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", *more, *COMMAND]
    launchers = {launcher: mock.Mock() for launcher in _ENVIRONMENTS}
    with mock.patch.multiple("accelerate.commands.launch", **launchers):
        launch_command(launch_command_parser().parse_args(words))
    ((launcher, called),) = [(name, mocked) for name, mocked in launchers.items() if mocked.called]
    arguments = called.call_args.args[0]
    return launcher, arguments, _ENVIRONMENTS[launcher](arguments)
