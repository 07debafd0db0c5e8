"""``torchdsc generate``."""

from pathlib import Path

from .parsing import command_parser


def run(arguments: list[str]) -> None:
    """Generate text with a trained model."""
    parser = command_parser("generate", "Generate text with a trained model.")
    parser.add_argument("model", type=str, help="folder of a run, or of its model")
    parser.add_argument("--prompt", type=str, default="The ", help="text to go on from")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus of probability to sample from")
    parser.add_argument("--seed", type=int, default=42, help="of sampling")
    options = parser.parse_args(arguments)
    from torchdsc.lab.generation import generate

    print(
        generate(
            Path(options.model),
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
    )
