"""``torchdsc presets``."""

from textwrap import fill

from torchdsc.lab.presets import describe_preset, preset_names

from .parsing import command_parser


def run(arguments: list[str]) -> None:
    """List the presets and what each is for."""
    command_parser("presets", "List the presets and what each is for.").parse_args(arguments)
    for commands, folder in (("compare and train", ()), ("adapt", ("adapt",)), ("study", ("study",))):
        print(f"of {commands}:")
        for name in preset_names(*folder):
            print(
                fill(
                    f"{name:<12} {describe_preset(name, *folder)}", 100, initial_indent="  ", subsequent_indent=" " * 15
                )
            )
