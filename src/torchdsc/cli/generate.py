"""``torchdsc generate``."""

from .parsing import ArgumentParser, existing


def run(arguments: list[str]) -> int:
    """Generate text with a trained model."""
    parser = ArgumentParser("generate", "Generate text with a trained model.")
    parser.add_argument("model", type=existing, help="folder of a model, an adapter or a run")
    parser.add_base()
    parser.add_argument("--prompt", default="The ", help="text to go on from")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus to sample from (default: 0.95)")
    parser.add_argument("--seed", type=int, default=42, help="of sampling (default: 42)")
    options = vars(parser.parse_args(arguments))
    from torchdsc.lab.training.generation import generate

    print(generate(options.pop("model"), options.pop("prompt"), **options))
    return 0
