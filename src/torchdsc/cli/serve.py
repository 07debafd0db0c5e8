"""``torchdsc serve``."""

from argparse import ArgumentTypeError

from .parsing import ArgumentParser, existing


def run(arguments: list[str]) -> int:
    """Serve a saved model or adapter over an OpenAI-compatible endpoint."""
    parser = ArgumentParser("serve", "Serve a saved model or adapter over an OpenAI-compatible endpoint.")
    parser.add_argument("folder", type=existing, help="folder of a model, an adapter, a checkpoint or a run")
    parser.add_base()
    parser.add_argument("--host", default="localhost", help="to listen on (default: localhost)")
    parser.add_argument("--port", type=_port, default=8000, help="to listen on (default: 8000)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: an accelerator if there is one)")
    options = vars(parser.parse_args(arguments))
    from torchdsc.lab.serving import serve

    serve(options.pop("folder"), **options)
    return 0


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 1 << 16):
        raise ArgumentTypeError(f"must be 1 to 65535, got {text!r}")
    return int(text)
