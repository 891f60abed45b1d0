"""The `dejavu` command, as it is started: ``dejavu``, ``python -m dejavu.launch.cli``, and by torchrun."""

import signal


def main() -> None:
    """Imports the commands, which takes seconds, and runs the one that was asked for."""
    # meanwhile Ctrl-C ends the process without a word, instead of in the middle of some module, at length
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dejavu.launch.commands import run_command

    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command()


if __name__ == "__main__":
    main()
